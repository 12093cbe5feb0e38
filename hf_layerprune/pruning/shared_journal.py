"""The journal of scores of a run with several processes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments

from ..surgery.decoder import is_sharded


JOURNAL_NAME = "scoring.jsonl"  # the scores so far, while a phase begins


@contextmanager
def shared_journal(args: TrainingArguments, model: PreTrainedModel) -> Iterator[Path | None]:
    """Yields the path of the journal, None for a sharded model: each process must run every forward pass.

    The main process has the journal in the output folder. The others get a copy, so that all leave out the
    same work and none waits for another.
    """
    if is_sharded(model):
        yield None
        return
    path = Path(str(args.output_dir)) / JOURNAL_NAME
    journal = path.read_bytes() if args.process_index == 0 and path.exists() else None
    [journal] = broadcast_object_list([journal])
    if args.process_index == 0:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / JOURNAL_NAME
        if journal is not None:
            copy.write_bytes(journal)
        yield copy
