"""Stores the results of long work on disk, so that interrupted work can continue."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.processes import process_index, run_together
from ..errors import LayerPruneError
from ..files import whole_file


logger = logging.getLogger(__name__)

HEAD = "hf_layerprune journal of"


class Journal:
    """Stores the results of deterministic work in a file, one JSON line per result.

    The work must compute the same values in the same order each time. Results in an earlier journal of the
    same work are not computed again. A journal of other work is overwritten. An incomplete line is ignored.
    In a distributed run, only the first process has the file. All processes get its results, so that they
    skip the same work.

    Args:
        path (`str` or `Path`, *optional*): the file. None: write nothing and compute everything.
        work (`str`): identifies the work.

    Raises:
        LayerPruneError: the file exists and is not a journal.
    """

    def __init__(self, path: str | Path | None, work: str) -> None:
        self._found: list[Any] = []
        self._path = Path(path) if path is not None and process_index() == 0 else None
        if path is not None:
            [self._found, *_] = run_together(lambda: _begin(self._path, work))

    @property
    def is_ahead(self) -> bool:
        """Whether the next result is in the journal."""
        return bool(self._found)

    def once(self, compute: Callable[[], Any]) -> Any:
        """Returns the next result from the journal, or computes and writes it. Results are JSON values."""
        if self._found:
            return self._found.pop()
        value = compute()
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(value) + "\n")
        return value

    def finish(self) -> None:
        """Removes the file when the work is done."""
        if self._path is not None:
            self._path.unlink()


def _begin(path: Path | None, work: str) -> list[Any]:
    """Returns the results in the file of a journal, last first, and rewrites the file with them.

    Raises:
        LayerPruneError: the file exists and is not a journal.
    """
    if path is None:
        return []
    found: list[Any] = []
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")[:-1]
    try:
        values = [json.loads(line) for line in lines]
    except ValueError:
        values = [None]
    # The first line is written when the journal is created, so every journal has it.
    if content and (not values or not isinstance(values[0], dict) or HEAD not in values[0]):
        raise LayerPruneError(f"{path} exists and holds no scores. Choose another file.")
    if values and values[0][HEAD] == work:
        found = values[1:]
        logger.info("%s: continuing after %d results.", path, len(found))
    elif values:
        logger.warning("%s is of another model or text: it starts afresh.", path)
    with whole_file(path) as file:
        for value in [{HEAD: work}, *found]:
            file.write(f"{json.dumps(value)}\n".encode())
    return found[::-1]
