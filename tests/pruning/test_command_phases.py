import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, get_lineage, load_model, score_layers
from hf_layerprune.commands.cli import main
from hf_layerprune.pruning.command_phases import run_phases
from hf_layerprune.reports.record import read_record
from hf_layerprune.surgery.removal import remove_layers

from ..conftest import logits, make_model, tokens
from ..test_examples import EXAMPLES


# A trainer of a kind: half of what the head says, and nothing else. It fails when told to.
TRAINER = """
import shutil, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file

model, output_dir, phase = sys.argv[1:4]
Path("calls.txt").open("a").write(phase)
if Path("fail").exists() and phase == Path("fail").read_text():
    sys.exit(3)
shutil.copytree(Path("elsewhere") if Path("elsewhere").exists() else model, output_dir, dirs_exist_ok=True)
weights = load_file(f"{output_dir}/model.safetensors")
weights["lm_head.weight"] *= 0.5
save_file(weights, f"{output_dir}/model.safetensors", metadata={"format": "pt"})
"""
BATCHES = [{"input_ids": tokens(4, 12, seed=5)}]


def run(output_dir="out", **settings):
    Path("trainer.py").write_text(TRAINER)
    make_model().save_pretrained("model")
    command = [sys.executable, "trainer.py", "{model}", "{output_dir}", "{phase}"]
    settings = {"target_layers": 3, "calibration": BATCHES, "command": command} | settings
    return run_phases(lambda folder: load_model(folder or "model"), output_dir=output_dir, **settings)


def expected(sizes):
    """The same by hand."""
    model, removed = make_model(), []
    for size in sizes:
        for _ in range(size):
            layer = score_layers(model, BATCHES, progress=False).ranking()[0]
            removed.append(get_lineage(model).kept[layer])
            remove_layers(model, layer)
        with torch.no_grad():
            model.lm_head.weight *= 0.5
    return model, removed


@pytest.mark.parametrize(("layers_per_phase", "sizes"), [(1, [1, 1, 1]), (0.34, [2, 1])])
def test_each_phase_is_trained_by_the_command(layers_per_phase, sizes):
    seen = []

    def evaluation(model):
        seen.append(len(get_lineage(model).kept))
        return {"std": float(logits(model, tokens()).std())}

    record = run(layers_per_phase=layers_per_phase, evaluation=evaluation)
    model, removed = expected(sizes)
    assert [one.original for phase in record.phases for one in phase.removals] == removed
    last = AutoModelForCausalLM.from_pretrained(f"out/phase_{len(sizes)}/healed").eval()
    assert torch.equal(logits(last, tokens()), logits(model, tokens()))
    depths = [6 - sum(sizes[:n]) for n in range(1, len(sizes) + 1)]
    assert seen == [6, *(depth for depth in depths for _ in ("cut", "healed"))]
    for phase in record.phases:
        assert phase.healed["std"] == pytest.approx(phase.cut["std"] / 2)
    assert read_record("out") == record
    assert record.finished
    assert not list(Path("out").glob("*/cut"))


def test_a_run_goes_on_with_the_phase_in_which_the_command_failed():
    Path("fail").write_text("2")
    with pytest.raises(
        LayerPruneError, match=r"exit code 3: .*phase_2/cut out/phase_2/healed 2\. Called again"
    ):
        run()
    before = read_record("out").phases
    Path("fail").unlink()
    record = run()
    assert Path("calls.txt").read_text() == "1223"
    assert record.phases[0] == before[0]
    assert record.phases[1].removals == before[1].removals
    model, _ = expected([1, 1, 1])
    last = AutoModelForCausalLM.from_pretrained("out/phase_3/healed").eval()
    assert torch.equal(logits(last, tokens()), logits(model, tokens()))
    assert run() == read_record("out")  # of a finished run nothing is done again
    assert Path("calls.txt").read_text() == "1223"


def test_a_command_that_trains_another_model_is_found_out():
    make_model().save_pretrained("elsewhere")
    with pytest.raises(LayerPruneError, match=r"was to leave a model with the layers \[.*\{model\} names"):
        run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": [sys.executable, "{model}"]}, r"must be a program, and name .*\{output_dir\}"),
        ({"command": ["no-such-program", "{model}", "{output_dir}"]}, "must be a program"),
        ({"command": []}, "must be a program"),
        ({"target_layers": 6}, "target_layers is 6"),
        ({"target_layers": 1}, "only 4 are not protected"),
        ({"criterion": "luck"}, "There is no criterion 'luck'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(LayerPruneError, match=message):
        run(**settings)
    assert not Path("out").exists()


def test_another_run_in_the_same_folder_is_refused():
    run(target_layers=5)
    with pytest.raises(LayerPruneError, match="began with target_layers=5, not 4"):
        run(target_layers=4)
    make_model().save_pretrained("taken")
    with pytest.raises(LayerPruneError, match="taken already holds another run or model"):
        run("taken", target_layers=5)


def test_the_example_of_a_phase_under_the_command_line(tokenizer, capfd):
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    text = "\n".join(f"Line {i} of a text that says little about the number {i * i}." for i in range(200))
    Path("text.txt").write_text(text)
    flags = [
        "--data",
        "text.txt",
        "--sequence_length",
        "16",
        "--target_layers",
        "4",
        "--layers_per_phase",
        "2",
    ]
    script = [
        sys.executable,
        str(EXAMPLES / "one_phase.py"),
        "{model}",
        "model",
        "text.txt",
        "{output_dir}",
        "4",
    ]
    assert main(["phases", "model", *flags, "--output_dir", "out", "--", *script]) == 0
    printed = capfd.readouterr().out
    assert "perplexity after removal" in printed
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.num_hidden_layers == 4
    record = json.loads(Path("out/layer_pruning.json").read_text())
    assert record["phases"][0]["healed"]["perplexity"] != record["phases"][0]["cut"]["perplexity"]
    assert "healed in each phase by a command of its own" in Path("out/README.md").read_text()
    assert main(["phases", "model", *flags, "--output_dir", "new"]) == 2
    assert "must be a program" in capfd.readouterr().err
