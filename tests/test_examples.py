import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from .conftest import make_model


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("script", ["drop_in.py", "plain_trainer.py", "lora.py"])
def test_an_example_runs_as_it_stands(script, tokenizer):
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    text = "\n".join(f"Line {i} of a text that says little about the number {i * i}." for i in range(200))
    Path("text.txt").write_text(text)
    command = [sys.executable, str(EXAMPLES / script), "model", "text.txt", "out", "4", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 4
