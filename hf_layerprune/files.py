"""Writes files that stay complete when the process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import LayerPruneError


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file whose content replaces `path` when the block ends without an error.

    A kill or a power loss at any moment leaves the old file or the new one, never a part: the content is on
    disk before the name changes.

    Args:
        path (`str` or `Path`): the file to replace. Its folder must exist.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_folder_of(path: str | None) -> None:
    """Checks that a file can be written to `path`.

    Raises:
        LayerPruneError: its folder does not exist.
    """
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise LayerPruneError(f"Cannot write {path}: its folder does not exist.")
