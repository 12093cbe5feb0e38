import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_layerprune.files import whole_file


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half of the new", None])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    code = (
        "import os, signal, sys\nfrom hf_layerprune.files import whole_file\n"
        "with whole_file(sys.argv[1]) as file:\n"
        "    file.write(b'half of the new')\n    file.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with whole_file(path) as file:  # over the draft that was left
        file.write(b"new")
    assert path.read_text() == "new"


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("sync"), fsync(number)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("replace"), replace(path, to)))
    with whole_file(tmp_path / "file") as file:
        file.write(b"content")
    assert events == ["sync", "replace", "sync"]
