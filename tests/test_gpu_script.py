"""The parts of the GPU script, with tiny models on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "examples" / "benchmarks" / "gpu.py"


def run(part, *flags):
    command = [sys.executable, str(SCRIPT), part, "out", "--tiny", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(Path("out", f"{part}.json").read_text())[part]


def test_all_checks_hold_on_a_cpu():
    found = run("checks")
    assert len(found) == 13
    assert {name: one for name, one in found.items() if not one["ok"]} == {}


def test_speeds_are_measured():
    found = run("speed", "--steps", "4")
    for kind in ("distillation", "compiled distillation", "plain Trainer"):
        assert found[kind]["tokens_per_second"] > 0
    assert found["scoring"]["tokens"] == 256


@pytest.mark.parametrize("most", [160, 10**9])
def test_a_model_is_healed_for_as_long_as_fits(most):
    found = run("heal", "--seconds", "0.5", "--most_tokens", str(2 * most))
    assert found["tokens"] <= 2 * most
    assert found["distinct_tokens"] <= found["tokens"]
    assert found["reconstruction"]["kl_after"] < found["reconstruction"]["kl_before"]
