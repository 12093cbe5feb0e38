"""Questions with choices, or with one answer: how often a model is right, each context read once."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batch, most_tokens
from ..errors import LayerPruneError
from ..forward.lm_head import Reader


@dataclass(frozen=True)
class Question:
    """A question with choices, or with one: then a model is right that finds each token of it the likeliest.

    Args:
        context (`str`): what comes before.
        choices (`list[str]`): what may follow it, with the space that goes before.
        answer (`int`, *optional*, defaults to 0): which of them is right, from 0.
    """

    context: str
    choices: list[str]
    answer: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model says of a question.

    Args:
        right (`bool`): whether it finds the right choice likeliest, or each token of the only one.
        perplexities (`list[float]`): of each choice, over its tokens.
    """

    right: bool
    perplexities: list[float]


@dataclass(frozen=True)
class Choices:
    """Some questions as a model reads them.

    Args:
        inputs (`dict`): of the model, `input_ids` `(rows, length)` and what goes with them.
        places (`torch.Tensor`): `(2, tokens)`, the row and position that predict each token of a choice.
        targets (`torch.Tensor`): `(tokens,)`, these tokens.
        owners (`torch.Tensor`): `(tokens,)`, which choice each is of, counted through all questions.
        lengths (`list[torch.Tensor]`): for each question `(choices,)`, what their log-likelihoods are
            divided by.
        answers (`list[int]`): for each question.
    """

    inputs: Batch
    places: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    lengths: list[torch.Tensor]
    answers: list[int]


@dataclass(frozen=True)
class _Encoded:
    """A question in tokens: what all its choices begin with, the rest of each, and how many tokens at the
    end of that are the choice itself; and its number among those given."""

    shared: list[int]
    rests: list[list[int]]
    scored: list[int]
    lengths: list[int]
    answer: int
    number: int

    @property
    def packed_length(self) -> int:
        return len(self.shared) + sum(map(len, self.rests))

    @property
    def length_in_rows(self) -> int:
        return len(self.rests) * (len(self.shared) + max(map(len, self.rests)))


class MultipleChoice:
    """A task for `criterion="task"`: how many questions a model answers right.

    The choices of a question stand in one row behind their common context and do not see each other, so
    that the context is read once. Where a model cannot read them so, each choice gets a row. Questions of
    like length share a batch; batches come in random order.

    Args:
        questions (sequence of [`Question`]): at least one.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        normalize (`bool`, *optional*, defaults to `True`): compare log-likelihoods per character of the
            choice (lm-eval's `acc_norm`); False compares those of the whole choice (`acc`).
        batch_tokens (`int`, *optional*): tokens that are read at once. Default: 1,024 on a CPU, 16,384
            elsewhere.

    Raises:
        LayerPruneError: no question, one without a right answer, or one with an empty choice.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        *,
        normalize: bool = True,
        batch_tokens: int | None = None,
    ) -> None:
        if not questions:
            raise LayerPruneError("A task needs at least one question.")
        for question in questions:
            known = type(question.answer) is int and 0 <= question.answer < len(question.choices)
            if not known or not all(one.strip() for one in question.choices):
                raise LayerPruneError(
                    f"{question}: a question needs choices, none empty, and the index of the right one."
                )
        self.batch_tokens = batch_tokens
        encoded = [_encode(question, tokenizer, normalize, i) for i, question in enumerate(questions)]
        self.encoded = sorted(encoded, key=lambda question: question.packed_length)

    def __len__(self) -> int:
        return len(self.encoded)

    def __call__(self, model: PreTrainedModel) -> float:
        """The share of right answers."""
        self.check_length(model)
        with torch.no_grad():
            reader = Reader(model, self.example(model))
            return torch.cat([right_answers(reader, batch) for batch in self.batches(reader)]).mean().item()

    def read(self, model: PreTrainedModel) -> list["Answer"]:
        """What a model says of each question, in the order in which they were given."""
        found: dict[int, Answer] = {}
        self.check_length(model)
        with torch.no_grad():
            reader = Reader(model, self.example(model))
            packed = _can_pack(reader, self.encoded[-1])
            for questions in self._groups(packed, model):
                batch = (_packed if packed else _in_rows)(questions, model)
                counts = torch.bincount(batch.owners).cpu()
                sizes = [len(lengths) for lengths in batch.lengths]
                likelihoods, greedy = log_likelihoods(reader, batch)
                right = _right(likelihoods, greedy, batch).tolist()
                perplexities = (-likelihoods.cpu() / counts).exp().split(sizes)
                for question, one, few in zip(questions, right, perplexities, strict=True):
                    found[question.number] = Answer(one == 1, few.tolist())
        return [found[number] for number in sorted(found)]

    def check_length(self, model: PreTrainedModel) -> None:
        """Check that `model` reads the longest question.

        Raises:
            LayerPruneError: it does not.
        """
        longest = max(len(one.shared) + max(map(len, one.rests)) for one in self.encoded)
        most = most_tokens(model)
        if most is not None and longest > most:
            raise LayerPruneError(
                f"A question has {longest} tokens, but the model reads {most} at most: leave such out."
            )

    def example(self, model: PreTrainedModel) -> torch.Tensor:
        """The tokens `(1, length)` of a question and a choice."""
        longest = self.encoded[-1]
        return torch.tensor([longest.shared + longest.rests[0]], device=model.device)

    def batches(self, reader: Reader) -> list[Choices]:
        """All questions as the reader's model reads them."""
        packed = _can_pack(reader, self.encoded[-1])
        build = _packed if packed else _in_rows
        batches = [build(questions, reader.model) for questions in self._groups(packed, reader.model)]
        random.Random(0).shuffle(batches)
        return batches

    def _groups(self, packed: bool, model: PreTrainedModel) -> Iterator[list[_Encoded]]:
        """Questions of like length, as many as may be read at once."""
        most = self.batch_tokens or (1024 if model.device.type == "cpu" else 16_384)
        group: list[_Encoded] = []
        for question in self.encoded:
            size = question.packed_length if packed else question.length_in_rows
            if group and (len(group) + 1) * size > most:
                yield group
                group = []
            group.append(question)
        yield group


def right_answers(reader: Reader, batch: Choices) -> torch.Tensor:
    """For each question 1 if the model is right, else 0, NaN where it says NaN: `(questions,)`, float64."""
    return _right(*log_likelihoods(reader, batch), batch)


def _right(likelihoods: torch.Tensor, greedy: torch.Tensor, batch: Choices) -> torch.Tensor:
    sizes = [len(lengths) for lengths in batch.lengths]
    parts = zip(likelihoods.split(sizes), greedy.split(sizes), batch.lengths, batch.answers, strict=True)
    found = [
        math.nan
        if one.isnan().any()
        else int((one / lengths).argmax()) == answer and (len(one) > 1 or bool(sure))
        for one, sure, lengths, answer in parts
    ]
    return torch.tensor(found, dtype=torch.float64)


def log_likelihoods(reader: Reader, batch: Choices) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each choice of each question, in nats: `(choices,)`, float64; and whether each of its tokens is the
    likeliest in its place: `(choices,)`."""
    row, place = batch.places
    logits = reader.rows(reader.states(batch.inputs)[row, place])
    found, missed = [], []
    for few, said in zip(logits, batch.targets.split(reader.rows_at_once), strict=True):
        found.append(few.float().log_softmax(-1).gather(-1, said[:, None])[:, 0].double())
        missed.append(few.argmax(-1) != said)
    sums = torch.zeros(sum(map(len, batch.lengths)), dtype=torch.float64, device=row.device)
    misses = torch.zeros_like(sums, dtype=torch.long).index_add_(0, batch.owners, torch.cat(missed).long())
    return sums.index_add_(0, batch.owners, torch.cat(found)), misses == 0


def _encode(question: Question, tokenizer: PreTrainedTokenizerBase, normalize: bool, number: int) -> _Encoded:
    """Tokens as lm-eval makes them: of context and choice together; what is more than the context's own
    number of tokens is the choice."""
    start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]

    def tokens(text: str) -> list[int]:
        return start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    context = question.context.rstrip()
    space = question.context[len(context) :]  # goes with the choice, as tokens hold the space before a word
    if not start and not context:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise LayerPruneError(f"{question}: without a context, the tokenizer needs a first token (bos).")
        start = [first]
    rows = [tokens(context + space + choice) for choice in question.choices]
    before = len(tokens(context))
    if any(len(row) <= before for row in rows):
        raise LayerPruneError(f"{question}: a choice has no token of its own.")
    shared = next(
        (i for i, same in enumerate(zip(*rows, strict=False)) if len(set(same)) > 1), min(map(len, rows))
    )
    shared = min(shared, before)
    lengths = [len(choice.removeprefix(" ")) if normalize else 1 for choice in question.choices]
    return _Encoded(
        rows[0][:shared],
        [row[shared:] for row in rows],
        [len(row) - before for row in rows],
        lengths,
        question.answer,
        number,
    )


def _packed(questions: Sequence[_Encoded], model: PreTrainedModel) -> Choices:
    """One row for each question: the context, then its choices, each of which sees the context and itself."""
    length = max(question.packed_length for question in questions)
    ids = torch.zeros((len(questions), length), dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(questions), 1, 1)  # what fills a row sees itself
    places, targets, owners = [], [], []
    choice = 0
    for row, question in enumerate(questions):
        common = len(question.shared)
        ids[row, :common] = torch.tensor(question.shared)
        positions[row, :common] = torch.arange(common)
        start = common
        seen[row, :common, :common] = torch.ones(common, common).tril().bool()
        for rest, scored in zip(question.rests, question.scored, strict=True):
            part = slice(start, start + len(rest))
            ids[row, part] = torch.tensor(rest)
            positions[row, part] = torch.arange(common, common + len(rest))
            seen[row, part, :common] = True
            seen[row, part, part] = torch.ones(len(rest), len(rest)).tril().bool()
            for index in range(len(rest) - scored, len(rest)):
                places.append((row, start + index - 1 if index else common - 1))
                targets.append(rest[index])
                owners.append(choice)
            start, choice = part.stop, choice + 1
    hidden = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": hidden[:, None]}
    return _choices(questions, inputs, places, targets, owners, model)


def _in_rows(questions: Sequence[_Encoded], model: PreTrainedModel) -> Choices:
    """One row for each choice, with its context. What fills the end of a row, no token before it sees."""
    rows = [question.shared + rest for question in questions for rest in question.rests]
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    places, targets, owners = [], [], []
    scored = [number for question in questions for number in question.scored]
    for row, (tokens, number) in enumerate(zip(rows, scored, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for index in range(len(tokens) - number, len(tokens)):
            places.append((row, index - 1))
            targets.append(tokens[index])
            owners.append(row)
    return _choices(questions, {"input_ids": ids}, places, targets, owners, model)


def _choices(
    questions: Sequence[_Encoded],
    inputs: dict[str, torch.Tensor],
    places: list[tuple[int, int]],
    targets: list[int],
    owners: list[int],
    model: PreTrainedModel,
) -> Choices:
    device = model.device
    return Choices(
        {name: value.to(device) for name, value in inputs.items()},
        torch.tensor(places, device=device).T,
        torch.tensor(targets, device=device),
        torch.tensor(owners, device=device),
        [torch.tensor(q.lengths, dtype=torch.float64, device=device) for q in questions],
        [q.answer for q in questions],
    )


def _can_pack(reader: Reader, question: _Encoded) -> bool:
    """Whether the model reads a question in one row as it reads each choice alone."""
    found = []
    for build in (_packed, _in_rows):
        batch = build([question], reader.model)
        try:
            found.append(reader.states(batch.inputs)[tuple(batch.places)].float())
        except Exception:  # a model that takes no such mask, or no positions
            return False
    packed, alone = found
    error = float((packed - alone).norm() / alone.norm())
    return error < min(0.05, 1000 * torch.finfo(reader.model.dtype).eps)
