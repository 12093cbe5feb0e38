"""Makes token sequences with labels from texts: joined and cut, packed, or one sequence for each text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import LayerPruneError
from .arguments import LOSSES, PACKINGS
from .sources import load_rows, names_of, unreadable
from .texts import Text, iter_texts


logger: Any = logging.get_logger(__name__)

LONGEST_DEFAULT = 1024  # tokens of a sequence if no length is set
IGNORED = -100  # the label of a token that the loss ignores


@dataclass
class Counts:
    """Counts of read, truncated and dropped texts of a data set.

    Args:
        texts (`int`): number of texts that were read.
        truncated (`int`): number of texts that were longer than a sequence.
        tokens_lost (`int`): number of tokens that truncation removed.
        unlabelled (`int`): number of texts without a token that counts in the loss. They are dropped.
    """

    texts: int = 0
    truncated: int = 0
    tokens_lost: int = 0
    unlabelled: int = 0

    def report(self, name: str) -> None:
        """Warns about texts that were dropped or truncated."""
        if self.truncated:
            logger.warning_once(
                f"{name}: {self.truncated} of {self.texts} texts are longer than a sequence. "
                f"{self.tokens_lost} tokens are cut off. Raise the sequence length to keep them."
            )
        if self.unlabelled:
            logger.warning_once(
                f"{name}: {self.unlabelled} of {self.texts} texts have no completion within a sequence and "
                "are skipped."
            )


def prepare_dataset(
    rows: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int = 256,
    *,
    packing: str = "joined",
    loss_on: str = "all",
    template: str | None = None,
    column: str = "text",
    limit: int | None = None,
    name: str = "The data",
) -> Dataset:
    """Returns a data set of token sequences for a Trainer, made of text, chats or prompts.

    Args:
        rows (iterable): strings, or rows with `text`, `messages`, `conversations`, or `prompt` and
            `completion`, see [`text_of`].
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        length (`int`, *optional*, defaults to 256): number of tokens in a sequence.
        packing (`str`, *optional*, defaults to `"joined"`):
            - `"joined"`: texts are joined with the end-of-text token between them and cut into sequences of
              equal length. Tokens attend to the texts before theirs in the sequence.
            - `"packed"`: each sequence holds whole texts. `position_ids` start again with each text, so that
              no token attends to another text. A text longer than a sequence is truncated.
            - `"none"`: each text becomes one sequence, truncated to `length`.
        loss_on (`str`, *optional*, defaults to `"all"`): the tokens with labels. `"all"`, or `"completion"`
            for the assistant turns of a chat or the completion after a prompt.
        template (`str`, *optional*), column (`str`, *optional*, defaults to `"text"`): see [`text_of`].
        limit (`int`, *optional*): maximum number of sequences.
        name (`str`, *optional*): name of the data in warnings.

    Returns:
        `Dataset`: columns `input_ids` and `labels`, with `"packed"` also `position_ids`.

    Raises:
        LayerPruneError: a row has another form, the texts are shorter than one sequence, or the completions
            in a text cannot be found.
    """
    if limit is not None and limit < 1:
        raise LayerPruneError(f"{limit} sequences are asked for. Choose at least 1.")
    sequences = iter_sequences(rows, tokenizer, length, packing, loss_on, template, column, name)
    return Dataset.from_list(list(islice(sequences, limit)))


def iter_sequences(
    rows: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    packing: str = "joined",
    loss_on: str = "all",
    template: str | None = None,
    column: str = "text",
    name: str = "The data",
) -> Iterator[dict[str, list[int]]]:
    """Yields the sequences of [`prepare_dataset`] one by one."""
    for setting, value, allowed in (("packing", packing, PACKINGS), ("loss_on", loss_on, LOSSES)):
        if value not in allowed:
            raise LayerPruneError(f"{setting} is {value!r}. Choose from {', '.join(allowed)}.")
    if length < 2:
        raise LayerPruneError(
            f"The sequence length is {length}. Choose at least 2 tokens: one has nothing to predict."
        )
    counts = Counts()
    texts = iter_texts(rows, tokenizer, template, column, name)
    encoded = _encoded(texts, tokenizer, loss_on, counts)
    start = start_tokens(tokenizer)
    pack = {"joined": _joined, "packed": _packed, "none": _single}[packing]
    try:
        yield from pack(encoded, start, length, counts)
    finally:
        counts.report(name)


def token_sequences(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> Dataset:
    """Tokenises documents and makes sequences of equal length.

    The documents are joined with the end-of-text token and cut into sequences. Each sequence starts with the
    beginning-of-text token if the tokenizer adds one.

    Args:
        texts (iterable of `str`): documents.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        length (`int`): number of tokens per sequence. An incomplete last sequence is dropped.
        limit (`int`, *optional*): maximum number of sequences. Default: all.

    Returns:
        `datasets.Dataset`: columns `input_ids` and `labels`, each of `length` tokens.

    Raises:
        LayerPruneError: the text is shorter than one sequence, or `limit` is below 1.
    """
    return prepare_dataset(texts, tokenizer, length, limit=limit)


def stream_sequences(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    first: int,
    source: str | Path | Sequence[str | Path],
    column: str = "text",
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    **form: Any,
) -> tuple[Dataset, IterableDataset]:
    """Returns token sequences of a text that is streamed during training and never completely in memory.

    Args:
        tokenizer, length, column, form: see [`prepare_dataset`].
        first (`int`): number of sequences at the start of the text that are held out for calibration and
            evaluation.
        source, split, config, revision: see [`load_rows`].

    Returns:
        `tuple[Dataset, IterableDataset]`: the first sequences, and all other sequences.

    Raises:
        LayerPruneError: [`load_rows`] or [`prepare_dataset`] fails, or the text has no sequence after the
            first ones.
    """
    origin = {"source": source, "split": split, "config": config, "revision": revision}
    settings: dict[str, Any] = {
        "origin": origin,
        "form": {"tokenizer": tokenizer, "length": length, "column": column} | form,
    }
    head = list(islice(_stream(**settings), first + 1))
    if len(head) <= first:
        raise LayerPruneError(
            f"{source} has {len(head)} sequences of {length} tokens, of which the first {first} are not "
            "trained on. Give more text, or ask for fewer sequences."
        )
    rest = IterableDataset.from_generator(_stream, gen_kwargs=settings | {"skip": first})
    return Dataset.from_list(head[:first]), rest


def _stream(origin: dict[str, Any], form: dict[str, Any], skip: int = 0) -> Iterator[dict[str, list[int]]]:
    source = origin["source"]
    name = names_of([source] if isinstance(source, (str, Path)) else source)
    rows = load_rows(**origin, streaming=True)
    try:
        yield from islice(iter_sequences(rows, name=name, **form), skip, None)
    except (DatasetGenerationError, OSError, RuntimeError) as error:
        raise unreadable(name, error) from error


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that the tokenizer adds before a text, for example [CLS] for BERT.

    Gemma predicts badly without its beginning-of-text token.
    """
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return [token for token in tokenizer("")["input_ids"] if token in first][:1]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token at the end of each text, if the tokenizer has one."""
    last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return [] if last is None else [last]


def _encoded(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, loss_on: str, counts: Counts
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens of each text, with the end-of-text token at the end, and their labels."""
    end = end_tokens(tokenizer)
    for text in texts:
        counts.texts += 1
        if loss_on == "all":
            # verbose=False: a text may be longer than the context of the model. The sequences are not.
            ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
            yield ids + end, ids + end
        else:
            ids, labels = _completion_labels(text, tokenizer)
            ends_in_completion = labels[-1:] != [IGNORED]
            yield ids + end, labels + (end if ends_in_completion else [IGNORED] * len(end))


def _completion_labels(text: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the tokens and labels of a text. Only completions have labels."""
    if not text.completions:
        raise LayerPruneError(
            "loss_on is 'completion', but a row has no completion that can be told: it is plain text, has no "
            "assistant turn, or the chat template writes earlier turns differently when later ones follow. "
            "Set loss_on to 'all', or give rows with prompt and completion."
        )
    if not tokenizer.is_fast:
        raise LayerPruneError(
            f"loss_on is 'completion', but {type(tokenizer).__name__} does not say which characters a token "
            "is. Load the fast tokenizer (use_fast=True), or set loss_on to 'all'."
        )
    found = tokenizer(text.text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    counted = [
        any(begin < last and first < end for first, last in text.completions)
        for begin, end in found["offset_mapping"]
    ]
    ids = found["input_ids"]
    return ids, [token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)]


def _joined(
    texts: Iterable[tuple[list[int], list[int]]], start: list[int], length: int, counts: Counts
) -> Iterator[dict[str, list[int]]]:
    size, ids, labels, found = length - len(start), list[int](), list[int](), False
    for more_ids, more_labels in texts:
        ids, labels = ids + more_ids, labels + more_labels
        whole = len(ids) // size * size
        for i in range(0, whole, size):
            found = True
            yield {"input_ids": start + ids[i : i + size], "labels": start + labels[i : i + size]}
        ids, labels = ids[whole:], labels[whole:]
    if not found:
        raise LayerPruneError(
            f"The text has {len(ids)} tokens, less than one sequence of {length}. Give more text or "
            "a smaller sequence_length."
        )


def _fitting(
    texts: Iterable[tuple[list[int], list[int]]], start: list[int], length: int, counts: Counts
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens and labels of each text, with the beginning-of-text token, cut to `length` tokens.

    Texts without a token that counts in the loss are dropped.
    """
    for ids, labels in texts:
        if ids[: len(start)] != start:  # a chat template may have added it
            ids, labels = start + ids, [IGNORED] * len(start) + labels
        if len(ids) > length:
            counts.truncated += 1
            counts.tokens_lost += len(ids) - length
            ids, labels = ids[:length], labels[:length]
        if all(label == IGNORED for label in labels[1:]):
            counts.unlabelled += 1
        else:
            yield ids, labels


def _packed(
    texts: Iterable[tuple[list[int], list[int]]], start: list[int], length: int, counts: Counts
) -> Iterator[dict[str, list[int]]]:
    """Yields sequences of whole texts in order. A sequence ends before the first text that does not fit."""
    held: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, labels in _fitting(texts, start, length, counts):
        if held["input_ids"] and len(held["input_ids"]) + len(ids) > length:
            yield held
            held = {"input_ids": [], "labels": [], "position_ids": []}
        # The last token of a text does not predict the first token of the next text.
        held["input_ids"] += ids
        held["labels"] += [IGNORED, *labels[1:]]
        held["position_ids"] += list(range(len(ids)))
    if not held["input_ids"]:
        raise LayerPruneError("There is no text to train on. Give more text.")
    yield held


def _single(
    texts: Iterable[tuple[list[int], list[int]]], start: list[int], length: int, counts: Counts
) -> Iterator[dict[str, list[int]]]:
    found = False
    for ids, labels in _fitting(texts, start, length, counts):
        found = True
        yield {"input_ids": ids, "labels": labels}
    if not found:
        raise LayerPruneError("There is no text to train on. Give more text.")


def check_sequence_length(length: int, model: PreTrainedModel | PreTrainedConfig) -> None:
    """Checks that the context of a model is long enough for sequences of `length` tokens.

    Raises:
        LayerPruneError: the context of the model is shorter.
    """
    longest = context_length(model)
    if longest is not None and length > longest:
        raise LayerPruneError(f"sequence_length is {length}, but the model reads {longest} tokens at most.")


def resolve_length(length: int | None, model: PreTrainedModel | PreTrainedConfig) -> int:
    """Returns `length` if it is set, else the context length of a model, at most 1024 tokens.

    Raises:
        LayerPruneError: the context of the model is shorter than `length`.
    """
    if length is None:
        return min(LONGEST_DEFAULT, context_length(model) or LONGEST_DEFAULT)
    check_sequence_length(length, model)
    return length


def context_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """Returns the context length of a model in tokens; None if its config has none."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def split_sequences(sequences: Dataset, calibration: int, heldout: int) -> tuple[Dataset, Dataset, Dataset]:
    """Splits sequences into three parts for calibration, evaluation and training.

    The sequences for calibration and evaluation are spread evenly over the text.

    Raises:
        LayerPruneError: there are too few sequences, or a part would be empty.
    """
    taken = calibration + heldout
    if calibration < 1 or heldout < 1 or taken > len(sequences):
        raise LayerPruneError(
            f"calibration_sequences is {calibration} and heldout_sequences is {heldout}, but the text has "
            f"{len(sequences)} sequences. Set both to at least 1, and together below that number so that "
            "some are left to train on. Or give more text, or a smaller sequence_length."
        )
    spread = [i * len(sequences) // taken for i in range(taken)]
    chosen = {spread[i * taken // calibration] for i in range(calibration)}
    return (
        sequences.select(sorted(chosen)),
        sequences.select([i for i in spread if i not in chosen]),
        sequences.select([i for i in range(len(sequences)) if i not in set(spread)]),
    )
