"""Text, from wherever it comes, as blocks of tokens and as batches."""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from transformers.utils import logging

from .errors import LayerPruneError


logger: Any = logging.get_logger(__name__)  # transformers', which can say a thing once

Batch = Mapping[str, torch.Tensor]

# Which loader of the datasets library reads which kind of file.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
}


def load_texts(
    source: str, field: str = "text", split: str = "train", config: str | None = None
) -> list[str]:
    """Read documents from a .txt, .jsonl or .jsonl.gz file, or from a data set on the hub.

    Args:
        source (`str`): path of a file, or id of a data set.
        field (`str`, *optional*, defaults to `"text"`): the column that holds the text.
        split (`str`, *optional*, defaults to `"train"`): for a data set, which part, for example
            `"train[:1000]"`.
        config (`str`, *optional*): for a data set, the name of its configuration.

    Raises:
        LayerPruneError: no such file or data set, no such field, or no text in it.
    """
    dataset = _load(source, field, split, config)
    texts = list(_documents(dataset[field], source, field))
    if not texts:
        raise LayerPruneError(f"There is no text in {source}.")
    return texts


def _documents(values: Iterable[Any], source: str, field: str) -> Iterator[str]:
    """The values that are text and not empty; how many are not is logged, also when no more are asked for."""
    read, skipped = 0, 0
    try:
        for value in values:
            read += 1
            if isinstance(value, str) and value.strip():
                yield value
            else:
                skipped += 1
    finally:
        if skipped:
            logger.warning_once(
                f"{source}: {skipped} of {read} rows have no text in {field!r} and are skipped."
            )


def load_rows(source: str, split: str = "train", config: str | None = None, streaming: bool = False) -> Any:
    """A data set of the `datasets` library from a .txt, .jsonl or .jsonl.gz file, or from the hub.

    Args:
        source, split, config: see [`load_texts`].
        streaming (`bool`, *optional*, defaults to `False`): read it bit by bit.

    Raises:
        LayerPruneError: no such file or data set.
    """
    path = Path(source)
    kind = next((suffix for suffix in LOADERS if path.name.endswith(suffix)), None)
    if kind is not None and not path.is_file():
        raise LayerPruneError(f"No such file: {source}")
    if kind is None and path.exists():
        raise LayerPruneError(f"Cannot read {source}: expected a file ending in {', '.join(LOADERS)}.")
    if kind is not None:
        _check_utf8(path, STREAM_CHECKED if streaming else None)
    try:
        if kind is not None:
            loader, options = LOADERS[kind]
            options = options | {"data_files": str(path), "split": "train", "streaming": streaming}
            return load_dataset(loader, **options)
        return load_dataset(source, config, split=split, streaming=streaming)
    except (DatasetGenerationError, DatasetNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(source, error) from error


STREAM_CHECKED = 2**24  # bytes of a stream that are looked at before it is read


def _check_utf8(path: Path, most: int | None) -> None:
    """Check that a file, or its first `most` bytes, is text in UTF-8.

    Raises:
        LayerPruneError: it is not.
    """
    decoder, read, start = codecs.getincrementaldecoder("utf-8")(), 0, b""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            while (most is None or read < most) and (piece := file.read(2**20)):
                start = start or piece[:2]
                if "\0" in decoder.decode(piece):  # as every second byte of English in UTF-16 is
                    raise UnicodeError("it holds zero bytes")
                read += len(piece)
            if most is None:
                decoder.decode(b"", final=True)
    except UnicodeError as error:
        marked = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or "zero bytes" in str(error)
        encoding = "UTF-16" if marked else "ISO-8859-1"
        raise LayerPruneError(
            f"{path} is not UTF-8 ({error}), but text files must be. Convert the file, for example: "
            f"iconv -f {encoding} -t UTF-8 {path.name} > NEW_FILE"
        ) from error
    except (OSError, EOFError, zlib.error):  # no file, or none of gzip, which its loader says
        return


def _unreadable(source: str, error: Exception) -> LayerPruneError:
    return LayerPruneError(f"Cannot read text from {source}: {' '.join(str(error).split())[:300]}")


def _load(source: str, field: str, split: str, config: str | None, streaming: bool = False) -> Any:
    dataset = load_rows(source, split, config, streaming)
    try:
        columns = dataset.column_names or list(next(iter(dataset)))  # a stream has to be looked into
    except StopIteration as error:
        raise LayerPruneError(f"There is no text in {source}.") from error
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(source, error) from error
    if field not in columns:
        raise LayerPruneError(f"{source} has no field {field!r}, only {columns}.")
    return dataset


def stream_blocks(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    first: int,
    source: str,
    field: str = "text",
    split: str = "train",
    config: str | None = None,
) -> tuple[Dataset, IterableDataset]:
    """Blocks of a text that is read bit by bit, as training goes on, and never all in memory.

    Args:
        tokenizer, length: see [`token_blocks`].
        first (`int`): so many blocks from its beginning are kept apart, for calibration and evaluation.
        source, field, split, config: see [`load_texts`].

    Returns:
        `tuple[Dataset, IterableDataset]`: the first blocks, and all that come after.

    Raises:
        LayerPruneError: as [`load_texts`], or the text has not more than the first blocks.
    """
    texts = {"source": source, "field": field, "split": split, "config": config}
    settings: dict[str, Any] = {"tokenizer": tokenizer, "length": length, **texts}
    head = list(islice(_stream(**settings), first + 1))
    if len(head) <= first:
        raise LayerPruneError(
            f"{source} has {len(head)} blocks of {length} tokens, of which the first {first} are not trained "
            "on: give more text, or ask for fewer blocks."
        )
    rest = IterableDataset.from_generator(_stream, gen_kwargs=settings | {"skip": first})
    return Dataset.from_list(head[:first]), rest


def _stream(
    tokenizer: PreTrainedTokenizerBase, length: int, skip: int = 0, **texts: Any
) -> Iterator[dict[str, list[int]]]:
    field = texts["field"]
    rows = (row[field] for row in _load(**texts, streaming=True))
    documents = _documents(rows, texts["source"], field)
    for block in islice(_cut(documents, tokenizer, length), skip, None):
        yield {"input_ids": block, "labels": block}


def token_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> Dataset:
    """Tokenise documents, join them with the end-of-text token, and cut them into equal blocks, each
    with the beginning-of-text token first where the tokenizer adds one.

    Args:
        texts (iterable of `str`): documents.
        tokenizer (`PreTrainedTokenizerBase`): the model's own.
        length (`int`): tokens in a block; what is left over at the end is dropped.
        limit (`int`, *optional*): stop after this many blocks.

    Returns:
        `datasets.Dataset`: columns `input_ids` and `labels`, each of `length` tokens.

    Raises:
        LayerPruneError: the text is empty or shorter than one block, or no block is asked for.
    """
    if limit is not None and limit < 1:
        raise LayerPruneError(f"{limit} blocks are asked for: it must be at least 1.")
    blocks = list(islice(_cut(texts, tokenizer, length), limit))
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _cut(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """The blocks of [`token_blocks`], one after another; its errors, too."""
    if length < 2:
        raise LayerPruneError(f"A block of {length} tokens has nothing to predict: use 2 or more.")
    last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    end = [] if last is None else [last]
    # What the tokenizer itself puts before a text; Gemma, for one, reads badly without it. BERT has [CLS].
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    start = [token for token in tokenizer("")["input_ids"] if token in first][:1]
    size = length - len(start)
    tokens, found = list[int](), False
    for text in texts:
        # verbose=False: a document may be longer than the model reads, the blocks cut from it are not.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        whole = len(tokens) // size * size
        for i in range(0, whole, size):
            found = True
            yield start + tokens[i : i + size]
        tokens = tokens[whole:]
    if not found:
        raise LayerPruneError(
            f"The text has {len(tokens)} tokens, less than one block of {length}. Give more text or "
            "shorter blocks."
        )


def check_block_length(length: int, model: PreTrainedModel | PreTrainedConfig) -> None:
    """Check that `model`, or the model that a config describes, reads so many tokens.

    Raises:
        LayerPruneError: it reads less.
    """
    longest = most_tokens(model)
    if longest is not None and length > longest:
        raise LayerPruneError(f"block_length is {length}, but the model reads {longest} tokens at most.")


def most_tokens(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """How many tokens a model reads at most, by its config; None where the config does not say."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def split_blocks(blocks: Dataset, calibration: int, heldout: int) -> tuple[Dataset, Dataset, Dataset]:
    """Take blocks for calibration and for evaluation, spread evenly over all; the rest is for training.

    Raises:
        LayerPruneError: there are too few blocks, or no block is asked for.
    """
    taken = calibration + heldout
    if calibration < 1 or heldout < 1 or taken > len(blocks):
        raise LayerPruneError(
            f"Cannot take {calibration} blocks for calibration and {heldout} for evaluation (at least 1 "
            f"each) out of {len(blocks)}: give more text, shorter blocks, or ask for fewer."
        )
    spread = [i * len(blocks) // taken for i in range(taken)]
    chosen = {spread[i * taken // calibration] for i in range(calibration)}
    return (
        blocks.select(sorted(chosen)),
        blocks.select([i for i in spread if i not in chosen]),
        blocks.select([i for i in range(len(blocks)) if i not in set(spread)]),
    )


def make_batches(
    data: Any,
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Any]] = default_data_collator,
) -> list[Batch]:
    """Batches of a data set of examples, in its order; ready batches (a list, a loader) stay as they are.

    Raises:
        LayerPruneError: there is nothing in it, or a batch is to hold nothing.
    """
    if batch_size < 1:
        raise LayerPruneError(f"The batch size is {batch_size}: it must be at least 1.")
    if isinstance(data, DataLoader):
        data = list(data)
    ready = isinstance(data, (list, tuple)) and data and torch.is_tensor(data[0].get("input_ids"))
    if ready and data[0]["input_ids"].dim() == 2:
        return list(data)
    if len(data) == 0:
        raise LayerPruneError("The calibration or evaluation data is empty.")
    # A generator of its own: a loader draws a seed, and scoring must not move the random state.
    own = torch.Generator()
    return list(DataLoader(data, batch_size, collate_fn=collate, generator=own))
