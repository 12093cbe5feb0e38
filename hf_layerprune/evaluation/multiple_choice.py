"""Measures the accuracy of a model on multiple-choice questions. Each context is read once."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.processes import check_same, make_together, read_all, run_together
from ..data.sequences import context_length
from ..data.targets import Batch
from ..errors import LayerPruneError
from ..forward.lm_head import ChunkedLMHead
from ..forward.token_losses import sum_dtype
from ..surgery.decoder import check_not_tensor_parallel, is_sharded, text_config
from ..surgery.peft import base_of


PACKING = ("eager", "sdpa")  # attention implementations that accept a mask for each pair of tokens


@dataclass(frozen=True)
class Question:
    """A question with choices. A model answers a single choice right if greedy decoding gives the choice.

    Args:
        context (`str`): the text before the choice.
        choices (`list[str]`): possible continuations, each with its leading space.
        answer (`int`, *optional*, defaults to 0): index of the right choice.
    """

    context: str
    choices: list[str]
    answer: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a question.

    Args:
        right (`bool`): whether the right choice is the most likely. For a single choice: whether each of its
            tokens is the most likely.
        perplexities (`list[float]`): perplexity of each choice, over its tokens.
    """

    right: bool
    perplexities: list[float]


@dataclass(frozen=True)
class Choices:
    """A batch of questions in the form that a model reads.

    Args:
        inputs (`dict`): the model's inputs: `input_ids` `(rows, length)`, and masks and positions if needed.
        places (`torch.Tensor`): `(2, tokens)`, row and position of the logits of each token of a choice.
        targets (`torch.Tensor`): `(tokens,)`, the tokens of the choices.
        owners (`torch.Tensor`): `(tokens,)`, the index of the choice of each token, over all questions.
        lengths (`list[torch.Tensor]`): the divisors of the log-likelihoods, `(choices,)` for each question.
        answers (`list[int]`): index of the right choice of each question.
    """

    inputs: Batch
    places: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    lengths: list[torch.Tensor]
    answers: list[int]


@dataclass(frozen=True)
class _Encoded:
    """A question in tokens.

    Args:
        shared (`list[int]`): tokens that all choices begin with.
        rests (`list[list[int]]`): the other tokens of each choice.
        scored (`list[int]`): for each choice, how many tokens at its end are scored.
        lengths (`list[int]`): the divisor of the log-likelihood of each choice.
        answer (`int`): index of the right choice.
        number (`int`): index of the question in the given order.
    """

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
    """Scores a model by its accuracy on questions. Use it as a task for `criterion="task"`.

    A row holds a context and all choices of its question. An attention mask separates the choices, so that
    the context is read once. For models without such masks, each choice gets its own row. Questions of
    similar length share a batch. The order of batches is random.

    Args:
        questions (sequence of [`Question`]): at least one question.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        normalize (`bool`, *optional*, defaults to `True`): whether to compare log-likelihoods per character
            (lm-eval's `acc_norm`), not those of the whole choice (`acc`).
        batch_tokens (`int`, *optional*): tokens in a batch. Default: 1,024 on a CPU, 16,384 on other devices.

    Raises:
        LayerPruneError: there is no question, or a question has no right answer or an empty choice.
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
        """Returns the share of right answers."""
        with torch.no_grad():
            lm_head = self.lm_head(model)

            def read(number: int, batch: Choices) -> list[float]:
                return right_answers(lm_head, batch).tolist()

            results = read_all(self.batches(lm_head), read, is_sharded(model))
            return (
                torch.tensor([one for right in results for one in right], dtype=torch.float64).mean().item()
            )

    def read(self, model: PreTrainedModel) -> list[Answer]:
        """Returns the answers of a model, in the order of the questions."""
        with torch.no_grad():
            lm_head = self.lm_head(model)
            packed = _can_pack(lm_head, self.encoded[-1])

            def read(number: int, questions: list[_Encoded]) -> dict[int, Answer]:
                batch = (_packed if packed else _in_rows)(questions, model)
                counts = torch.bincount(batch.owners).cpu()
                sizes = [len(lengths) for lengths in batch.lengths]
                likelihoods, greedy = log_likelihoods(lm_head, batch)
                right = _right(likelihoods, greedy, batch).tolist()
                perplexities = (-likelihoods.cpu() / counts).exp().split(sizes)
                return {
                    question.number: Answer(one == 1, few.tolist())
                    for question, one, few in zip(questions, right, perplexities, strict=True)
                }

            groups = list(self._groups(packed, model))
            results = list(read_all(groups, read, is_sharded(model)))
        found = {number: answer for result in results for number, answer in result.items()}
        return [found[number] for number in sorted(found)]

    def lm_head(self, model: PreTrainedModel) -> ChunkedLMHead:
        """Returns what computes the logits of `model` for these questions, after the checks.

        Raises:
            LayerPruneError: the questions differ between processes, or do not fit into the context.
        """
        check_not_tensor_parallel(base_of(model))
        check_same((self.batch_tokens, self.encoded), "The questions")
        self.check_length(model)
        return make_together(lambda: ChunkedLMHead(model, self.example(model)))

    def check_length(self, model: PreTrainedModel) -> None:
        """Checks that the longest question fits into the context of `model`.

        Raises:
            LayerPruneError: the longest question does not fit into the context.
        """
        longest = max(len(one.shared) + max(map(len, one.rests)) for one in self.encoded)
        most = context_length(model)
        if most is not None and longest > most:
            raise LayerPruneError(
                f"A question has {longest} tokens, but the model reads {most} at most. Leave out longer ones."
            )

    def example(self, model: PreTrainedModel) -> torch.Tensor:
        """Returns the tokens `(1, length)` of the longest question with a choice."""
        longest = self.encoded[-1]
        return torch.tensor([longest.shared + longest.rests[0]], device=model.device)

    def batches(self, lm_head: ChunkedLMHead) -> list[Choices]:
        """Returns all questions as batches, in random order."""
        packed = _can_pack(lm_head, self.encoded[-1])
        build = _packed if packed else _in_rows
        batches = [build(questions, lm_head.model) for questions in self._groups(packed, lm_head.model)]
        random.Random(0).shuffle(batches)
        return batches

    def _groups(self, packed: bool, model: PreTrainedModel) -> Iterator[list[_Encoded]]:
        """Yields groups of questions of similar length, one group for each batch."""
        most = self.batch_tokens or (1024 if model.device.type == "cpu" else 16_384)
        group: list[_Encoded] = []
        for question in self.encoded:
            size = question.packed_length if packed else question.length_in_rows
            if group and (len(group) + 1) * size > most:
                yield group
                group = []
            group.append(question)
        yield group


def right_answers(lm_head: ChunkedLMHead, batch: Choices) -> torch.Tensor:
    """Returns 1 for each question that the model answers right, 0 for a wrong answer, NaN for NaN logits.

    Returns:
        `torch.Tensor`: `(questions,)`, see [`sum_dtype`].
    """
    return _right(*log_likelihoods(lm_head, batch), batch)


def _right(likelihoods: torch.Tensor, greedy: torch.Tensor, batch: Choices) -> torch.Tensor:
    sizes = [len(lengths) for lengths in batch.lengths]
    # All questions at once, as the CPU waits for a GPU at each number that it reads.
    ranked = _by_question(likelihoods / torch.cat(batch.lengths), sizes, -math.inf)
    right = ranked.argmax(1) == torch.tensor(batch.answers, device=ranked.device)
    sure = _by_question(greedy, sizes, True).all(1)
    right &= sure | (torch.tensor(sizes, device=ranked.device) > 1)
    return torch.where(ranked.isnan().any(1), math.nan, right.to(ranked.dtype))


def _by_question(values: torch.Tensor, sizes: list[int], padding: float) -> torch.Tensor:
    """Returns the values of all choices as `(questions, largest number of choices)`, padded."""
    return pad_sequence(list(values.split(sizes)), batch_first=True, padding_value=padding)


def log_likelihoods(lm_head: ChunkedLMHead, batch: Choices) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-likelihood of each choice in nats, `(choices,)`, and whether greedy decoding
    gives it, `(choices,)`."""
    row, place = batch.places
    logits = lm_head.rows(lm_head.states(batch.inputs)[row, place])
    dtype = sum_dtype(row.device)
    found, missed = [], []
    for few, said in zip(logits, batch.targets.split(lm_head.rows_at_once), strict=True):
        found.append(few.float().log_softmax(-1).gather(-1, said[:, None])[:, 0].to(dtype))
        missed.append(few.argmax(-1) != said)
    sums = torch.zeros(sum(map(len, batch.lengths)), dtype=dtype, device=row.device)
    misses = torch.zeros_like(sums, dtype=torch.long).index_add_(0, batch.owners, torch.cat(missed).long())
    return sums.index_add_(0, batch.owners, torch.cat(found)), misses == 0


def _encode(question: Question, tokenizer: PreTrainedTokenizerBase, normalize: bool, number: int) -> _Encoded:
    """Returns a question in tokens. As in lm-eval, context and choice are tokenised together. The tokens of
    the choice are those after the number of tokens of the context alone."""
    start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]

    def tokens(text: str) -> list[int]:
        return start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    context = question.context.rstrip()
    space = question.context[len(context) :]  # part of the choice: tokens begin with the space
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
    """Returns a batch with one row per question: the context, then its choices, masked from each other."""
    length = max(question.packed_length for question in questions)
    ids = torch.zeros((len(questions), length), dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(questions), 1, 1)  # padding attends to itself
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
    """Returns a batch with one row per choice: the context and the choice, padded on the right."""
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
        [torch.tensor(q.lengths, dtype=sum_dtype(device), device=device) for q in questions],
        [q.answer for q in questions],
    )


def _can_pack(lm_head: ChunkedLMHead, question: _Encoded) -> bool:
    """Returns whether all processes may pack questions, so that all make the same batches."""
    return all(run_together(lambda: _packs(lm_head, question)))


def _packs(lm_head: ChunkedLMHead, question: _Encoded) -> bool:
    """Returns whether the model gives the same states for a question in one row as for each choice alone.

    Attention implementations outside [`PACKING`] do not accept such a mask. FlashAttention reads it as
    lengths, which ends the process on a GPU.
    """
    # transformers has no public name for the attention that a model uses.
    if text_config(base_of(lm_head.model).config)._attn_implementation not in PACKING:
        return False
    found = []
    for build in (_packed, _in_rows):
        batch = build([question], lm_head.model)
        try:
            found.append(lm_head.states(batch.inputs)[tuple(batch.places)].float())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model accepts no such mask, or no positions
            return False
    packed, alone = found
    error = float((packed - alone).norm() / alone.norm())
    return error < min(0.05, 1000 * torch.finfo(lm_head.model.dtype).eps)
