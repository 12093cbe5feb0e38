"""Scripts as users have them prune a model when three lines of them change."""

import difflib
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprune import load_pruned_adapter
from hf_layerprune.reports.record import read_record

from .conftest import logits, make_model, tokens


SCRIPTS = Path(__file__).parent / "user_scripts"
# trl marks what the assistant writes.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}<end>"
    "{% endgeneration %}{% else %}U: {{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
DISTILLATION = (
    "from hf_layerprune import DistillationTrainer as Trainer, "
    "DistillationTrainingArguments as TrainingArguments"
)
CALLBACK = "from hf_layerprune import LayerPruningCallback"
CHANGES = {  # new lines, each after a line of the script
    "causal_lm": {
        "from transformers.trainer_utils import get_last_checkpoint": f"{DISTILLATION}\n{CALLBACK}",
        "        processing_class=tokenizer,": "        callbacks=[LayerPruningCallback(target_layers=4)],",
    },
    "sft_chat": {
        "from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser": CALLBACK,
        '        eval_dataset=dataset["test"],': (
            "        callbacks=[pruning := LayerPruningCallback(target_layers=4)],"
        ),
        "    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)": (
            "    pruning.set_trainer(trainer)"
        ),
    },
    "adapters": {
        "name, text, output_dir = sys.argv[1:4]": f"{DISTILLATION}\n{CALLBACK}",
        '    eval_dataset=dataset["test"],': "    callbacks=[LayerPruningCallback(target_layers=4)],",
    },
    "adapters_alone": {  # in a plain Trainer
        "name, text, output_dir = sys.argv[1:4]": CALLBACK,
        '    eval_dataset=dataset["test"],': (
            "    callbacks=[pruning := LayerPruningCallback(target_layers=4)],"
        ),
        "trainer.train()": "pruning.set_trainer(trainer)",
    },
}
BEFORE = ("    trainer.train(", "trainer.train()")  # lines before which a new one stands
SHORT = {
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "output_dir": "out",
}


def words(**settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def run(tokenizer, monkeypatch):
    """Runs a script with its changes, in a folder with a tiny chat model, text and chats."""
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("model/chat_template.jinja").write_text(TEMPLATE)
    lines = [f"Line {i} of a text that says little about the number {i * i}." for i in range(80)]
    Path("text.txt").write_text("\n".join(lines[:60]))
    Path("other.txt").write_text("\n".join(lines[60:]))
    turns = [("Hi" * (i % 5 + 1), f"No {i}") for i in range(48)]
    talks = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]}
        for one, two in turns
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, talks)))
    prompts = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in talks]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))

    def run(name, *arguments):
        script = (SCRIPTS / f"{name.removesuffix('_alone')}.py").read_text()
        changed = script
        for line, new in CHANGES[name].items():
            assert changed.count(f"\n{line}\n") == 1
            pair = [new, line] if line.startswith(BEFORE) else [line, new]
            changed = changed.replace(f"\n{line}\n", "\n{}\n{}\n".format(*pair))
        difference = [
            one for one in difflib.ndiff(script.splitlines(), changed.splitlines()) if one[0] in "+-"
        ]
        assert 1 <= len(difference) <= 3
        Path("script.py").write_text(changed)
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        runpy.run_path("script.py", run_name="__main__")

    return run


def reloaded(folder="out"):
    """A plain model of four layers, which needs no code of ours."""
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert "auto_map" not in config
    AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_script_for_causal_language_models(run):
    settings = {"model_name_or_path": "model", "train_file": "text.txt", "validation_file": "other.txt"}
    command = [*words(**settings, block_size=32, **SHORT), "--do_train", "--do_eval"]
    run("causal_lm", *command)
    model = reloaded()
    results = json.loads(Path("out/all_results.json").read_text())
    assert results["train_samples"] > 0
    assert 0 <= results["eval_accuracy"] <= 1
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-5)
    assert read_record("out").finished
    assert "with 4 of its 6 decoder layers" in Path("out/README.md").read_text()
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 4
    # Stopped after two steps and started again, the script ends with the same weights.
    shutil.rmtree("out/checkpoint-4")
    Path("out/model.safetensors").unlink()
    run("causal_lm", *command)
    for name, weight in reloaded().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("chats.jsonl", {}),
        ("chats.jsonl", {"packing": True}),
        ("chats.jsonl", {"assistant_only_loss": True}),
        ("chats.jsonl", {"packing": True, "assistant_only_loss": True}),
        ("prompts.jsonl", {"completion_only_loss": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # trl uses its old names
def test_a_script_of_trl_for_chats(run, data, settings):
    command = words(dataset_name=data, max_length=48, **SHORT, **settings)
    run("sft_chat", "--model_name_or_path", "model", *command)
    model = reloaded()
    record = read_record("out")
    assert record.finished
    assert len(record.removals) == 2
    # Stopped after two steps, it goes on from the checkpoint with the same layers.
    shutil.rmtree("out/checkpoint-4")
    Path("out/model.safetensors").unlink()
    last = words(model_name_or_path="out/checkpoint-2", resume_from_checkpoint="out/checkpoint-2")
    run("sft_chat", *last, *command)
    for name, weight in reloaded().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing")
@pytest.mark.parametrize("name", ["adapters", "adapters_alone"])
def test_a_script_of_peft(run, name):
    run(name, "model", "text.txt", "out")
    assert read_record("out").finished
    pruned = load_pruned_adapter("out/adapter")
    assert any(p.abs().sum() > 0 for key, p in pruned.named_parameters() if "lora_B" in key)
    expected = logits(pruned.eval(), tokens())
    pruned.merge_and_unload().save_pretrained("merged")
    AutoTokenizer.from_pretrained("out/adapter").save_pretrained("merged")
    torch.testing.assert_close(logits(reloaded("merged"), tokens()), expected)
