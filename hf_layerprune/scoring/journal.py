"""Results of long work on disk, so that work which was stopped goes on where it was."""

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
    """Results of work that computes the same things in the same order, one line of JSON each.

    What an earlier journal of the same work holds is not computed again; one of other work starts afresh. A
    line that was not written to its end counts as missing. Of several processes the first has the file. All
    know what it holds, so that all leave out the same work.

    Args:
        path (`str` or `Path`, *optional*): the file; None writes nothing and computes everything.
        work (`str`): what the results are of.

    Raises:
        LayerPruneError: the file is there and is no journal.
    """

    def __init__(self, path: str | Path | None, work: str) -> None:
        self._found: list[Any] = []
        self._path = Path(path) if path is not None and process_index() == 0 else None
        if path is not None:
            [self._found, *_] = run_together(lambda: _begin(self._path, work))

    @property
    def is_ahead(self) -> bool:
        """Whether the next result is there already."""
        return bool(self._found)

    def once(self, compute: Callable[[], Any]) -> Any:
        """Returns the next result, of plain JSON values, from the journal, or computes and writes it."""
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
    """Returns the results in the file of a journal, last first, and begins the file anew with them.

    Raises:
        LayerPruneError: the file is there and is no journal.
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
    # The first line is written whole, so that of a journal there is one.
    if content and (not values or not isinstance(values[0], dict) or HEAD not in values[0]):
        raise LayerPruneError(f"{path} is there already and holds no scores: name another file.")
    if values and values[0][HEAD] == work:
        found = values[1:]
        logger.info("%s: %d results are there already.", path, len(found))
    elif values:
        logger.warning("%s is of another model or text: it starts afresh.", path)
    with whole_file(path) as file:
        for value in [{HEAD: work}, *found]:
            file.write(f"{json.dumps(value)}\n".encode())
    return found[::-1]
