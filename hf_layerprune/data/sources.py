"""Loads rows of text, chats or prompts from files, folders, standard input and the hub."""

import codecs
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..errors import LayerPruneError, one_line


# The loader of the datasets library for each file ending.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".md": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
COMPRESSED = (".gz", ".zst")  # of text files; parquet and arrow files are compressed internally
TEXT_FILES = (".txt", ".md", ".json", ".jsonl", ".csv")
STREAM_CHECKED = 2**24  # bytes of a text file that are checked before it is streamed
SUPPORTED = (
    f"{', '.join(LOADERS)} ({', '.join(TEXT_FILES)} also with {' or '.join(COMPRESSED)}), a folder of these, "
    "a folder of save_to_disk, a glob, - for standard input, or the id of a data set on the hub"
)


def load_rows(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Any:
    """Returns the rows of one or more sources as one data set.

    Args:
        source (`str`, `Path` or a sequence of them): one or more of
            - files: .txt, .md, .json, .jsonl, .csv, .parquet or .arrow; text files also with .gz or .zst. A
              .txt or .md file is one row.
            - folders of files, folders written by `save_to_disk`, and globs.
            - ids of data sets on the hub.
            - `"-"` for standard input.
        split (`str`, *optional*, defaults to `"train"`): the split of a data set on the hub, for example
            `"train[:1000]"`, or of a data set written by `save_to_disk`.
        config (`str`, *optional*): the configuration of a data set on the hub.
        revision (`str`, *optional*): the branch, tag or commit of a data set on the hub.
        streaming (`bool`, *optional*, defaults to `False`): read rows only when they are needed.

    Returns:
        `Dataset`, or `IterableDataset` with `streaming=True`: the rows of all sources, one source after
            another. A column that a source lacks is None in its rows.

    Raises:
        LayerPruneError: a source does not exist, is of another kind, or cannot be read.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise LayerPruneError(f"No data is given. Give {SUPPORTED}.")
    parts = [part for one in sources for part in _load_source(str(one), split, config, revision, streaming)]
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets([_with_plain_strings(part) for part in parts])
    except ValueError as error:
        raise LayerPruneError(
            f"The rows of {', '.join(map(str, sources))} do not fit together: {one_line(error)} Give sources "
            "with the same columns, or one of them alone."
        ) from error


def _with_plain_strings(rows: Any) -> Any:
    """Returns rows whose strings have one type. The csv and json loaders return different string types."""
    features = rows.features or {}  # may be unknown for a stream
    large = {name: Value("string") for name, kind in features.items() if kind == Value("large_string")}
    return rows.cast(Features(dict(features) | large)) if large else rows


def _load_source(
    source: str, split: str, config: str | None, revision: str | None, streaming: bool
) -> list[Any]:
    if source == "-":
        return [_read_standard_input()]
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [_load_saved(path, split, streaming)]
        return _load_files(_files_in(path), streaming)
    if path.is_file():
        return _load_files([path], streaming)
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True))
        if not found:
            raise LayerPruneError(f"No file matches {source}.")
        return _load_files([one for one in found if one.is_file()], streaming)
    if kind_of(path) is not None or path.is_absolute():
        raise LayerPruneError(f"No such file: {source}")
    try:
        return [load_dataset(source, config, split=split, revision=revision, streaming=streaming)]
    except (DatasetGenerationError, DatasetNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise LayerPruneError(
            f"{source} is neither a file nor a folder here, and cannot be read from the hub: "
            f"{one_line(error)} Give {SUPPORTED}."
        ) from error


def kind_of(path: Path) -> str | None:
    """Returns the ending of a supported file without `.gz` or `.zst`, for example `.jsonl`; else None."""
    name = path.name
    for ending in COMPRESSED:
        if name.endswith(ending):
            kind = Path(name.removesuffix(ending)).suffix.lower()
            return kind if kind in TEXT_FILES else None
    kind = path.suffix.lower()
    return kind if kind in LOADERS else None


def _files_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    readable = [path for path in files if kind_of(path) is not None]
    if not readable:
        found = ", ".join(sorted({path.suffix or path.name for path in files})[:8]) or "no files"
        raise LayerPruneError(f"The folder {folder} holds {found}, but no data. Give {SUPPORTED}.")
    return readable


def _load_files(files: list[Path], streaming: bool) -> list[Any]:
    """Returns one data set for each file ending."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kind = kind_of(file)
        if kind is None:
            raise LayerPruneError(f"Cannot read {file}: expected {SUPPORTED}.")
        if not file.stat().st_size:
            raise LayerPruneError(f"{file} is empty: there is no text in it.")
        if kind in TEXT_FILES:
            _check_utf8(file, STREAM_CHECKED if streaming else None)
        kinds.setdefault(LOADERS[kind][0], []).append(file)
    return [_load_kind(paths, streaming) for paths in kinds.values()]


def _load_kind(files: list[Path], streaming: bool) -> Any:
    loader, options = LOADERS[kind_of(files[0]) or ""]
    try:
        return load_dataset(
            loader, data_files=[str(file) for file in files], split="train", streaming=streaming, **options
        )
    except (DatasetGenerationError, OSError, RuntimeError, ValueError, ImportError) as error:
        raise unreadable(", ".join(map(str, files[:3])), error) from error


def _check_utf8(path: Path, most: int | None) -> None:
    """Checks that a file, or its first `most` bytes, is UTF-8 text.

    Raises:
        LayerPruneError: the file is not UTF-8 text.
    """
    if path.name.endswith(".zst"):  # only the loader can read it
        return
    decoder, read, wide = codecs.getincrementaldecoder("utf-8")(), 0, False
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            while (most is None or read < most) and (piece := file.read(2**20)):
                wide = b"\0" in piece  # every second byte of English text in UTF-16 is zero
                decoder.decode(piece)
                if wide:
                    raise UnicodeError("it holds zero bytes")
                read += len(piece)
            if most is None:
                decoder.decode(b"", final=True)
    except UnicodeError as error:
        encoding = "UTF-16" if wide else "ISO-8859-1"
        raise LayerPruneError(
            f"{path} is not UTF-8 ({error}), but text files must be. Convert the file, for example: "
            f"iconv -f {encoding} -t UTF-8 {path.name} > NEW_FILE"
        ) from error
    except (OSError, EOFError, zlib.error):  # a damaged file: the loader raises the error
        return


def unreadable(source: str, error: Exception) -> LayerPruneError:
    """Returns the error for a source that the datasets library cannot read, with the first cause."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return LayerPruneError(f"Cannot read {source}: {one_line(error)}")


def _load_saved(folder: Path, split: str, streaming: bool) -> Any:
    """Returns a data set that `save_to_disk` wrote. If it has several splits, returns the named split."""
    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(str(folder), error) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise LayerPruneError(f"{folder} has no split {split!r}. Choose from {', '.join(found)}.")
        found = found[split]
    return found.to_iterable_dataset() if streaming else found


def _read_standard_input() -> Dataset:
    """Returns the rows of standard input: JSON lines, or one row with the whole text."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeError as error:
        raise LayerPruneError(f"Standard input is not UTF-8 ({error}). Convert the text first.") from error
    if not text.strip():
        raise LayerPruneError("Standard input is empty. Pipe text or JSON lines into the command.")
    if not text.lstrip().startswith("{"):
        return Dataset.from_dict({"text": [text]})
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise LayerPruneError(f"Line {number} of standard input is not JSON: {error}") from error
    return Dataset.from_list(rows)


def names_of(sources: Iterable[str | Path]) -> str:
    """Returns the names of sources for a card: file and folder names without their paths, and hub ids."""
    return ", ".join(Path(one).name if Path(one).exists() else str(one) for one in sources)
