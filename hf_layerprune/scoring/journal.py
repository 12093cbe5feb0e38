"""Results of long work on disk, so that interrupted work continues."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError
from ..files import whole_file


logger = logging.getLogger(__name__)

HEAD = "hf_layerprune journal of"


class Journal:
    """Results of work that always computes the same values in the same order, one JSON line each.

    Results in an earlier journal of the same work are not computed again. A journal of other work is
    overwritten. An incomplete line counts as missing.

    Args:
        path (`str` or `Path`, *optional*): the file. None: write nothing and compute everything.
        work (`str`): identifies the work.

    Raises:
        LayerPruneError: the file exists and is not a journal.
    """

    def __init__(self, path: str | Path | None, work: str) -> None:
        self._path = None if path is None else Path(path)
        self._found: list[Any] = []
        if self._path is None:
            return
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = content.split(b"\n")[:-1]
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            values = [None]
        # The first line is written at once, so a journal always has it.
        if content and (not values or not isinstance(values[0], dict) or HEAD not in values[0]):
            raise LayerPruneError(f"{self._path} exists and holds no scores. Choose another file.")
        if values and values[0][HEAD] == work:
            self._found = values[1:]
            logger.info("%s: continuing after %d results.", self._path, len(self._found))
        elif values:
            logger.warning("%s is of another model or text: it starts afresh.", self._path)
        with whole_file(self._path) as file:
            for value in [{HEAD: work}, *self._found]:
                file.write(f"{json.dumps(value)}\n".encode())
        self._found.reverse()

    @property
    def is_ahead(self) -> bool:
        """Returns whether the next result is in the journal."""
        return bool(self._found)

    def once(self, compute: Callable[[], Any]) -> Any:
        """Returns the next result from the journal, or computes and writes it. It has plain JSON values."""
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
