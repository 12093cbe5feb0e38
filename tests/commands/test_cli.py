import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_layerprune import MultipleChoice, remove_layers, stability
from hf_layerprune.checkpoints.loading import load_tokenizer
from hf_layerprune.commands.cli import COMMANDS, main
from hf_layerprune.commands.flags import name_flags
from hf_layerprune.evaluation import evaluate as evaluation
from hf_layerprune.evaluation.comparison import tasks_done

from ..conftest import TEXT, make_model
from ..evaluation.test_multiple_choice import QUESTIONS


DATA = ["--data", "text.txt", "--sequence_length", "16"]


def test_score_prints_the_ranking_and_writes_table_and_plot(folder, capsys):
    flags = [*DATA, "--calibration_sequences", "4", "--plot", "p.png", "--json", "s.json"]
    assert main(["score", folder, *flags]) == 0
    table = json.loads(Path("s.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == sorted(
        table["scores"], key=lambda layer: table["scores"][layer]
    )
    assert Path("p.png").stat().st_size > 1000


def test_score_says_how_alike_two_texts_rank(folder, capsys):
    Path("other.txt").write_text(TEXT[::-1])
    flags = [*DATA, "--calibration_sequences", "4"]
    assert main(["score", folder, *flags, "--json", "s.json", "--block_size", "2", "--racing", "0.9"]) == 0
    assert " +- " in capsys.readouterr().out
    for other, expected in (("s.json", "rank correlation 1.000"), ("other.txt", "rank correlation")):
        assert main(["score", folder, *flags, "--block_size", "2", "--compare", other]) == 0
        assert f"Compared with {other}: {expected}" in capsys.readouterr().out
    assert main(["score", folder, *flags, "--compare", "none.json"]) == 2
    assert "No score table can be read from none.json" in capsys.readouterr().err


def test_prune_writes_a_cut_model(folder, capsys):
    flags = ["--target_layers", "4", "--output_dir", "cut", "--criterion", "block_influence", "--legacy_rope"]
    assert main(["prune", folder, *DATA, *flags]) == 0
    assert AutoModelForCausalLM.from_pretrained("cut").config.num_hidden_layers == 4
    assert "rope_theta" in json.loads(Path("cut/config.json").read_text())
    assert "| perplexity |" in capsys.readouterr().out
    assert {"README.md", "layer_pruning.json", "tokenizer.json"} <= {p.name for p in Path("cut").iterdir()}


@pytest.mark.parametrize("how", [["--hidden_weight", "0.1"], ["--lora_rank", "2"], ["--trainable", "1"]])
def test_distill_removes_and_heals(how, folder, capsys):
    flags = ["--target_layers", "4", "--output_dir", "healed", "--max_steps", "4", *how]
    more = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--calibration_sequences", "4"]
    assert main(["distill", folder, *DATA, *flags, *more]) == 0
    saved = AutoModelForCausalLM.from_pretrained("healed")
    assert saved.config.num_hidden_layers == 4
    assert not any("lora" in name for name in saved.state_dict())
    assert "| parameters |" in capsys.readouterr().out
    assert main(["evaluate", folder, "healed", *DATA, "--json", "e.json"]) == 0
    found = json.loads(Path("e.json").read_text())["models"]
    assert [found[name]["layers"] for name in ("model", "healed")] == [6, 4]


def test_what_was_taught_is_learnt_without_the_teacher(folder, capsys):
    keep = ["--output_dir", "said", "--top_k", "9", "--hidden_layers", "2", "5"]
    assert main(["cache-teacher", folder, *DATA, *keep]) == 0
    assert "said: " in capsys.readouterr().out
    flags = ["--teacher", "said", "--hidden_weight", "0.1", "--target_layers", "5", "--output_dir", "healed"]
    more = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    assert main(["distill", folder, *DATA, *flags, *more, "--calibration_sequences", "4"]) == 0
    assert AutoModelForCausalLM.from_pretrained("healed").config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache-teacher", "model", *DATA, "--output_dir", "model"], "model holds no cached teacher logits"),
        (["cache-teacher", "model", *DATA, "--output_dir", "x", "--top_k", "999"], "top_k is 999"),
        (
            ["scroe"],
            "There is no command 'scroe'. Did you mean score? Choose from quickstart, inspect, plan, score",
        ),
        (["score", "nowhere", "--data", "text.txt"], "Cannot load a model from 'nowhere'"),
        (["score", ".", "--data", "text.txt"], "not a folder with a model"),
        (["score", "model", *DATA, "--data", "none.txt"], "No such file: none.txt"),
        (["score", "model", *DATA, "--data", "empty.txt"], "no text in"),
        (["score", "model"], "--data"),
        (
            ["score", "model", *DATA, "--luck", "3"],
            "There is no flag --luck. See hf-layerprune score --help.",
        ),
        (["score", "model", *DATA, "--criterium", "kl"], "no flag --criterium. Did you mean --criterion?"),
        (
            ["distill", "model", *DATA, "--target-layer=3", "--keeep", "3"],
            "no flag --keeep. Did you mean --keep?",
        ),
        (["run", "default", "--modle", "model"], "There is no flag --modle. Did you mean --model?"),
        (["score", "model", *DATA, "--racing", "0.9", "9"], "There is no argument '9'."),
        (
            ["run", "shortgtp", "--model", "x"],
            "no recipe 'shortgtp'. Did you mean shortgpt? Choose from deepest",
        ),
        (["run", "--model", "x"], "RECIPE is missing. Choose from deepest, default"),
        (["study", "lossses"], "There is no study 'lossses'. Did you mean losses? Choose from baseline"),
        (["score", "model", *DATA, "--criterion", "luck"], "luck"),
        (["score", "model", *DATA, "--protected", "9"], "No layers [9]"),
        (["score", "model", "--data", "text.txt", "--sequence_length", "65"], "reads 64 tokens at most"),
        (["score", "model", "--data", "short.txt", "--sequence_length", "16"], "less than one sequence"),
        (["prune", "model", *DATA, "--target_layers", "6", "--output_dir", "x"], "target_layers is 6"),
        (["prune", "model", *DATA, "--target_layers", "3", "--output_dir", "model"], "already holds"),
        (["prune", "model", *DATA, "--target_layers", "x", "--output_dir", "x"], "invalid int value"),
        (["distill", "model", *DATA, "--target_layers", "9", "--output_dir", "x"], "target_layers is 9"),
        (["distill", "model", *DATA, "--target_layers", "4", "--kl_weight", "-1"], "kl_weight is -1.0"),
        (["distill", "model", *DATA, "--target_layers", "4", "--output_dir", "model"], "already holds"),
        (["evaluate", "--data", "text.txt"], "model"),
        (["evaluate", "model", *DATA, "--max_sequences", "-1"], "-1 sequences are asked for"),
        (
            ["evaluate", "model", *DATA, "--tasks", "questions=text.txt"],
            "text.txt, row 1: no row of questions",
        ),
        (["evaluate", "model", *DATA, "--tasks", "questions=none.jsonl"], "No such file: none.jsonl"),
        (["evaluate", "model", *DATA, "--tasks", "questions"], "questions=FILE"),
        (
            ["evaluate", "model", *DATA, "--tasks", "piqua"],
            "no task 'piqua' built in. Did you mean piqa? Choose from hellaswag, arc_easy",
        ),
        (["evaluate", "model", *DATA, "--tasks", "piqa", "--limit", "1"], "limit is 1"),
        (["evaluate", "model", *DATA, "--json", "no/such/e.json"], "Cannot write no/such/e.json"),
        (["score", "model", *DATA, "--json", "no/such/s.json"], "Cannot write no/such/s.json"),
        (["score", "model", *DATA, "--plot", "no/such/s.png"], "Cannot write a picture to no/such/s.png"),
        (["score", "model", *DATA, "--plot", "s.xyz"], "Cannot write a picture to s.xyz"),
        (
            ["prune", "model", *DATA, "--target_layers", "3", "--output_dir", "text.txt"],
            "Cannot write to the output folder text.txt",
        ),
        (["distill", "model", *DATA, "--target_layers", "4", "--heldout_sequences", "181"], "none is left"),
        (["distill", "model", *DATA, "--target_layers", "4", "--report_to", "foo"], "foo is not supported"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("short")
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hf-layerprune: error: ")
    assert message in last


def test_help_names_every_command(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for name, function in COMMANDS.items():
        assert name in out
        assert function.__doc__.splitlines()[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: hf-layerprune {command}" in capsys.readouterr().out


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hf_layerprune", "score", "nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_scoring_that_was_killed_goes_on(folder):
    flags = ["score", folder, *DATA, "--calibration_sequences", "180", "--json"]
    assert main([*flags, "expected.json"]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_layerprune", *flags, "s.json"], stderr=subprocess.DEVNULL
    )
    part = Path("s.json.part")
    while process.poll() is None and not (part.exists() and part.read_text().count("\n") > 3):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert part.read_text().count("\n") < 46  # a line for each batch, and the head
    assert main([*flags, "s.json"]) == 0
    assert Path("s.json").read_text() == Path("expected.json").read_text()
    assert not part.exists()


def test_evaluate_says_how_far_models_answer_alike(folder, capsys):
    remove_layers(model := make_model(), [2, 3])
    model.save_pretrained("cut")
    load_tokenizer(folder).save_pretrained("cut")
    lines = [{"context": q.context, "choices": q.choices, "answer": q.answer} for q in QUESTIONS]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["evaluate", folder, "cut", *DATA, "--tasks", "questions=q.jsonl", "--json", "e.json"]) == 0
    found = json.loads(Path("e.json").read_text())["models"]
    task = MultipleChoice(QUESTIONS, load_tokenizer(folder))
    dense, cut = (found[name]["tasks"]["questions"] for name in ("model", "cut"))
    assert cut["stability"] == pytest.approx(stability(task.read(make_model()), task.read(model)))
    assert dense["accuracy"] == pytest.approx(task(make_model()))
    assert dense["stability"]["stability"] == pytest.approx(1.0)
    size = Path("cut/model.safetensors").stat().st_size
    assert found["cut"]["file_mb"] == pytest.approx(size / 2**20, abs=0.1)
    printed = capsys.readouterr().out
    assert f"{cut['agreement']['share']:.3f} ± " in printed
    assert "stability" not in printed  # of a few questions
    assert f"{dense['accuracy']:.3f} ± {dense['standard_error']:.3f}" in printed
    assert ("accuracy above chance (% of dense)" in printed) == bool(tasks_done(found["model"]))


def test_a_run_resumes_by_a_flag(folder, tmp_path):
    flags = ["--target_layers", "4", "--output_dir", "healed", "--max_steps", "4", "--save_steps", "1"]
    flags += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--calibration_sequences", "4"]
    assert main(["distill", folder, *DATA, *flags]) == 0
    first = load_file("healed/model.safetensors")
    for step in (3, 4):
        shutil.rmtree(f"healed/checkpoint-{step}")
    Path("healed/model.safetensors").unlink()
    assert main(["distill", folder, *DATA, *flags]) == 2  # another run is there
    assert main(["distill", folder, *DATA, *flags, "--resume"]) == 0
    again = load_file("healed/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert json.loads(Path("healed/checkpoint-4/trainer_state.json").read_text())["global_step"] == 4


def test_optimum_has_the_same_commands(folder):
    """By the file that the build put where optimum looks."""
    program = Path(sys.executable).with_name("optimum-cli")
    done = subprocess.run([program, "layerprune", "inspect", folder], capture_output=True, text=True)
    assert done.returncode == 0
    assert "6 of 6 layers" in done.stdout
    done = subprocess.run([program, "layerprune", "inspect", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_what_was_evaluated_is_not_measured_again(folder, capsys, monkeypatch):
    remove_layers(model := make_model(), [2, 3])
    model.save_pretrained("cut")
    load_tokenizer(folder).save_pretrained("cut")
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"text": f"The dog barked {i} times"}) + "\n" for i in "abc")
    )
    measured, evaluate_model = [], evaluation.evaluate_model

    def measure(model, *args):
        measured.append(model.config.num_hidden_layers)
        if len(measured) == 3 or measured[-1] == 5:
            raise KeyboardInterrupt
        return evaluate_model(model, *args)

    monkeypatch.setattr(evaluation, "evaluate_model", measure)
    flags = [*DATA, "--max_sequences", "4", "--tasks", "lambada_openai=rows.jsonl", "--json", "e.json"]
    assert main(["evaluate", folder, "cut", *flags]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", folder, "cut", *flags]) == 0
    assert capsys.readouterr().out == table
    assert measured == [6, 4]
    model.model.norm.weight.data += 1  # in the same folder, another model
    model.save_pretrained("cut")
    assert main(["evaluate", folder, "cut", *flags]) == 130
    assert main(["evaluate", folder, "cut", *flags]) == 0
    assert measured == [6, 4, 4, 4]
    assert main(["evaluate", folder, "cut", *flags, "--limit", "2"]) == 0
    assert measured == [6, 4, 4, 4, 6, 4]
    other = make_model(num_hidden_layers=5)
    other.save_pretrained("other")
    load_tokenizer(folder).save_pretrained("other")
    assert main(["evaluate", folder, "other", "cut", *flags, "--limit", "2"]) == 130
    assert main(["evaluate", folder, "cut", *flags, "--limit", "2"]) == 0
    assert measured == [6, 4, 4, 4, 6, 4, 5]  # a stop loses nothing that was there
    Path("e.json").write_text("[]")
    assert main(["evaluate", folder, *flags]) == 2
    assert "e.json is not from evaluate --json" in capsys.readouterr().err


def test_a_task_is_asked_once(folder, capsys):
    words = ["evaluate", folder, *DATA, "--tasks", "questions=a.jsonl", "questions=b.jsonl"]
    assert main(words) == 2
    assert "tasks has questions more than once" in capsys.readouterr().err


def test_what_cannot_be_compared_costs_no_scores(folder, capsys, monkeypatch):
    words = ["score", folder, *DATA, "--calibration_sequences", "4"]
    assert main([*words, "--block_size", "2", "--json", "runs.json"]) == 0
    assert main([*words, "--json", "one.json", "--compare", "runs.json"]) == 2
    assert "runs.json scores blocks of 2 layers, not of 1" in capsys.readouterr().err
    assert json.loads(Path("one.json").read_text())["scores"]
    assert main([*words, "--json", "two.json", "--compare", "none.txt"]) == 2
    assert "No such file: none.txt" in capsys.readouterr().err
    assert not Path("two.json").exists()


@pytest.fixture
def folder_without_pad(folder, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    plain.save_pretrained(folder)
    return folder


TRAINING = ["--max_steps", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]


@pytest.mark.parametrize(
    "words",
    [
        ["score"],
        ["prune", "--target_layers", "5", "--output_dir", "out"],
        ["distill", "--target_layers", "5", "--output_dir", "out", *TRAINING],
        ["distill", "--target_layers", "5", "--output_dir", "out", "--lora_rank", "2", *TRAINING],
        ["run", "default", "--keep", "5", "--output_dir", "out", *TRAINING],
        ["run", "iterative", "--keep", "5", "--output_dir", "out", "--steps_per_phase", "1", *TRAINING[2:]],
        ["cache-teacher", "--output_dir", "out"],
        ["evaluate", "--tasks", "questions=rows.jsonl"],
    ],
)
def test_no_command_needs_a_padding_token(words, folder_without_pad):
    rows = [{"context": "The quick", "choices": [" brown fox", " dog"], "answer": i % 2} for i in range(4)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command, *flags = words
    where = ["--model", folder_without_pad] if command == "run" else [folder_without_pad]
    name, flags = (flags[:1], flags[1:]) if command == "run" else ([], flags)
    few = [] if command in ("cache-teacher", "evaluate") else ["--calibration_sequences", "4"]
    assert main([command, *name, *where, *DATA, *flags, *few]) == 0
    if Path("out/tokenizer_config.json").exists():
        assert load_tokenizer("out").pad_token is None


TEXTS_THAT_CANNOT_BE = {
    "none.txt": (None, "No such file: none.txt"),
    "wide.txt": (TEXT.encode("utf-16"), "wide.txt is not UTF-8"),
    "short.txt": (b"short", "less than one sequence"),
    "other.jsonl": (b'{"body": "x"}', "holds a row with ['body']. Each row needs"),
}


@pytest.mark.parametrize("text", TEXTS_THAT_CANNOT_BE)
@pytest.mark.parametrize(
    "words",
    [
        ["score", "model"],
        ["prune", "model", "--target_layers", "5", "--output_dir", "out"],
        ["distill", "model", "--target_layers", "5", "--output_dir", "out"],
        ["run", "shortgpt", "--model", "model", "--keep", "5", "--output_dir", "out"],
        ["cache-teacher", "model", "--output_dir", "out"],
        ["evaluate", "model"],
    ],
)
def test_the_text_is_checked_before_the_weights_are_loaded(words, text, folder, capsys):
    Path("model/model.safetensors").write_bytes(b"whoever reads this fails")
    content, message = TEXTS_THAT_CANNOT_BE[text]
    if content is not None:
        Path(text).write_bytes(content)
    assert main([*words, "--data", text, "--sequence_length", "16"]) == 2
    assert message in capsys.readouterr().err


def test_score_checks_the_other_text_too(folder, capsys):
    Path("model/model.safetensors").write_bytes(b"whoever reads this fails")
    assert main(["score", "model", *DATA, "--calibration_sequences", "4", "--compare", "none.txt"]) == 2
    assert "No such file: none.txt" in capsys.readouterr().err


def test_evaluate_reads_tasks_without_a_text(folder, capsys):
    rows = [{"context": "The quick", "choices": [" brown fox", " dog"], "answer": i % 2} for i in range(4)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = ["--tasks", "questions=rows.jsonl", "--json", "e.json"]
    remove_layers(model := make_model(), 2)
    model.save_pretrained("cut")
    load_tokenizer("model").save_pretrained("cut")
    assert main(["evaluate", "model", "cut", *tasks]) == 0
    printed = capsys.readouterr().out
    assert "mean accuracy" in printed
    assert "perplexity" not in printed
    found = json.loads(Path("e.json").read_text())
    assert found["text"] is None
    assert "loss" not in found["models"]["cut"]
    assert main(["evaluate", "model", "cut", *tasks]) == 0  # which measures nothing again
    assert main(["evaluate", "model", "cut"]) == 2
    assert "give a text with --data, or --tasks, or both" in capsys.readouterr().err
    assert main(["prune", "model", *DATA, "--target_layers", "5", "--output_dir", "pruned"]) == 0
    assert main(["evaluate", "model", "pruned", *tasks]) == 0
    assert main(["card", "pruned", "--evaluation", "e.json"]) == 0
    assert "copying on" not in Path("pruned/README.md").read_text()


def test_a_task_that_only_lm_eval_has_says_so(folder, capsys):
    assert main(["evaluate", "model", "--tasks", "mmlu"]) == 2
    assert "no task 'mmlu' built in" in (error := capsys.readouterr().err)
    assert "add --lm_eval True" in error


TRAIN = ["--target_layers", "3", "--output_dir", "out", "--use_cpu", "True", "--report_to", "none"]
TRAIN += ["--calibration_sequences", "4", "--disable_tqdm", "True", "--save_steps", "2"]


def test_ctrl_c_ends_with_a_line_that_says_how_to_resume(folder, capsys):
    words = ["distill", folder, *DATA, *TRAIN]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_layerprune", *words, "--max_steps", "5000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell lets its background jobs ignore SIGINT, and so would their children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not Path("out/checkpoint-4").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("hf-layerprune: interrupted. Its last checkpoint is out/checkpoint-")
    assert "add --resume" in last
    assert main([*words, "--max_steps", "5000"]) == 2  # it holds a run, which can be resumed
    assert "resume that run with --resume." in capsys.readouterr().err
    assert main([*words, "--max_steps", "5000", "--criterion", "block_influence", "--resume"]) == 2
    assert "began with --criterion loss, not block_influence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "place", "advice"),
    [
        (
            ["distill", "model", *DATA, *TRAIN],
            "distillation.trainer.DistillationTrainer.train",
            "wrote no checkpoint",
        ),
        (["prune", "model", *DATA, *TRAIN[:4]], "pruning.prune.prune_layers", "Nothing was kept"),
        (["score", "model", *DATA, "--json", "s.json"], "scoring.score.score_layers", "again to continue"),
        (["score", "model", *DATA], "scoring.score.score_layers", "with --json FILE to be able to continue"),
        (
            ["cache-teacher", "model", *DATA, "--output_dir", "x"],
            "distillation.teacher_cache.cache_teacher_logits",
            "to continue",
        ),
    ],
)
def test_each_command_says_how_to_go_on_after_ctrl_c(folder, words, place, advice, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hf_layerprune.{place}", interrupt)
    assert main(words) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hf-layerprune: interrupted. ")
    assert advice in last


@pytest.mark.parametrize("command", [["distill", "model"], ["run", "default", "--model", "model"]])
def test_what_shows_the_logs_must_be_installed(folder, command, capsys, monkeypatch):
    """In one line, before the model is loaded."""
    for place in ("inputs", "prune"):
        name = f"hf_layerprune.recipes.{place}.load_on_device"
        monkeypatch.setattr(name, lambda *args, **options: pytest.fail("loaded"))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    target = ["--target_layers", "3"] if command[0] == "distill" else ["--keep", "3"]
    for reporter, message in (("wandb", "requires wandb to be installed"), ("foo", "foo is not supported")):
        assert main([*command, *DATA, *target, "--output_dir", "x", "--report_to", reporter]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert errors[-1].startswith(f"hf-layerprune: error: --report_to {reporter}: ")
        assert message in errors[-1]
        assert not Path("x").exists()


@pytest.mark.parametrize("command", ["prune", "distill"])
def test_a_taken_folder_advises_only_what_there_is(folder, command, capsys):
    words = [command, folder, *DATA, "--target_layers", "3", "--output_dir", folder]
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "already holds another run or model (config.json). Choose a new folder." in last
    assert "resume" not in last


def test_messages_name_flags(folder, capsys, caplog):
    assert main(["run", "default", "--model", folder, *DATA, "--keep", "9", "--output_dir", "x"]) == 2
    assert "error: --target_layers is 9, but the model has 6 layers" in capsys.readouterr().err
    assert main(["evaluate", folder, *DATA, "--limit", "1"]) == 2
    assert "error: --limit is 1" in capsys.readouterr().err
    assert main(["score", folder, *DATA, "--sequence_length", "65"]) == 2
    assert "error: --sequence_length is 65, but the model reads 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("set hidden_weight=0, or trainable='all'.", "set --hidden_weight 0, or --trainable all."),
        ("Raise steps_per_phase.", "Raise --steps_per_phase."),
        ("go on with resume_from_checkpoint=True.", "go on with --resume."),
        ("racing is 2: racing goes with loss", "--racing is 2: racing goes with loss"),
        ("the folder a/output_dir/b and output_dir.txt", "the folder a/output_dir/b and output_dir.txt"),
        ("give it as teacher_model.", "give it as --teacher."),
        ("`hf-layerprune distill --teacher` reads --output_dir.",) * 2,
        ("pass hidden_layers=[...].", "pass --hidden_layers=[...]."),
        ("max_stepsize and my_max_steps", "max_stepsize and my_max_steps"),
    ],
)
def test_an_argument_is_named_as_its_flag(message, named):
    names = ["hidden_weight", "trainable", "steps_per_phase", "resume", "racing", "output_dir", "teacher"]
    assert name_flags(message, [*names, "hidden_layers", "max_steps"]) == named
    assert name_flags(message, []) == message
