"""Work on batches in several processes, against one."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from hf_layerprune import LayerPruneError, MultipleChoice, score_layers
from hf_layerprune.data.arguments import SequenceArguments
from hf_layerprune.evaluation.evaluate import copying, evaluate_text, measure_quality
from hf_layerprune.pruning.linear_map import replace_by_linear_map
from hf_layerprune.recipes.arguments import TextArguments
from hf_layerprune.recipes.inputs import make_sequences

from ..conftest import make_model, tokens
from ..evaluation.test_multiple_choice import QUESTIONS


ROOT = Path(__file__).parents[2]

RANK = """
import json
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast
from tests.data.test_processes import {name}

torch.set_num_threads(1)
dist.init_process_group("gloo")
{name}(*{arguments!r})
dist.barrier()
dist.destroy_process_group()
"""


def launch(function, *arguments, processes=2):
    """Runs a function of this file in several processes."""
    text = textwrap.dedent(RANK).format(root=str(ROOT), name=function.__name__, arguments=arguments)
    Path("rank.py").write_text(text)
    words = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "rank.py"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr.partition("torch/distributed/elastic")[0][-4000:]


def text(count, rows=2):
    """Batches of different lengths, of which different numbers of tokens count."""
    batches = [{"input_ids": tokens(rows, 12 + i % 3, seed=i)} for i in range(count)]
    for i, batch in enumerate(batches):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, : i % 5] = -100
    return batches


def counted(model):
    """The list of batches that the layers of a model read, by their shape: the last layer always runs."""
    passes = []
    model.base_model.layers[-1].register_forward_hook(
        lambda module, args, output: passes.append(list(args[0].shape[:2])) if args[0].shape[1] > 8 else None
    )
    return passes


SCORED = [
    ("loss", {}),
    ("loss", {"racing": 0.6}),
    ("kl", {}),
    ("hidden_mse", {}),
    ("block_influence", {}),
    ("angular", {"block_size": 2}),
    ("taylor", {}),
]


def score(counts, rows=2):
    """Scores with each criterion, and leaves the tables and how many rows each process read."""
    tables, passes = [], []
    for count in counts:
        for criterion, settings in SCORED:
            model = make_model()
            seen = counted(model)
            table = score_layers(model, text(count, rows), criterion, progress=False, **settings)
            tables.append(table.to_dict())
            passes.append(sum(rows for rows, _ in seen))
    write("scores", {"tables": tables, "passes": passes})


def write(name, values):
    rank = dist.get_rank() if dist.is_initialized() else "alone"
    Path(f"{name}-{rank}.json").write_text(json.dumps(values))


def read(name, *ranks):
    return [json.loads(Path(f"{name}-{rank}.json").read_text()) for rank in ranks]


def test_two_processes_give_the_table_of_one_with_half_the_passes():
    launch(score, [6])
    score([6])
    one, *two = read("scores", "alone", 0, 1)
    assert two[0]["tables"] == two[1]["tables"]
    for (criterion, _), found, expected in zip(SCORED, two[0]["tables"], one["tables"], strict=True):
        if criterion == "taylor":  # a sum of float32 gradients, in another order
            assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)
        else:
            assert found == expected
    counts = zip(SCORED, *(each["passes"] for each in (one, *two)), strict=True)
    for (criterion, settings), alone, *shared in counts:
        if not settings.get(
            "racing"
        ):  # a candidate that is dropped in the middle of a turn is read to its end
            assert shared == [alone / 2] * 2, criterion


def test_batches_that_do_not_divide_are_shared():
    """Four batches in three processes, and one batch, whose rows are then shared."""
    launch(score, [4, 1], 4, processes=3)
    score([4, 1], 4)
    one, *others = read("scores", "alone", 0, 1, 2)
    for other in others:
        assert other["tables"] == others[0]["tables"]
        for found, expected in zip(other["tables"], one["tables"], strict=True):
            assert found["scores"] == pytest.approx(expected["scores"], rel=1e-4, abs=1e-6)
            assert found["seen"] == expected["seen"]
        assert all(0 < number < alone for number, alone in zip(other["passes"], one["passes"], strict=True))


def evaluate():
    """Measures a model in each way, and replaces layers by a linear map."""
    model, tokenizer = make_model(), PreTrainedTokenizerFast.from_pretrained("tokenizer")
    seen, found = counted(model), []

    def measure(function, *arguments):
        seen.clear()
        found.append((function(*arguments), len(seen)))

    measure(lambda: evaluate_text(model, text(6), tokenizer)["loss"])
    measure(lambda: copying(model, [{"input_ids": tokens(2, 12 + i, seed=i)} for i in range(6)]))
    questions = MultipleChoice(QUESTIONS * 2, tokenizer, batch_tokens=60)
    measure(questions, model)
    measure(lambda: [[one.right, one.perplexities] for one in questions.read(model)])
    measure(lambda: measure_quality(model, text(6), Share()))
    measure(lambda: score_layers(model, (), "task", task=questions, progress=False).to_dict())
    measure(lambda: replace_by_linear_map(model, 2, 2, text(6)).tolist())
    write("evaluation", found)


class Share:
    """A metric, as of the package evaluate."""

    def compute(self, predictions, references):
        return {"accuracy": sum(map(int.__eq__, predictions, references)) / len(references)}


def test_evaluation_and_linear_map_are_shared(tokenizer):
    tokenizer.save_pretrained("tokenizer")
    launch(evaluate)
    evaluate()
    one, *two = read("evaluation", "alone", 0, 1)
    for place, ((expected, alone), *shared) in enumerate(zip(one, *two, strict=True)):
        assert shared[0][0] == shared[1][0]
        if place < len(one) - 1:
            assert shared[0][0] == expected
        else:  # a map is fitted to sums in another order
            torch.testing.assert_close(*map(torch.tensor, (shared[0][0], expected)), rtol=1e-3, atol=1e-5)
        assert sum(number for _, number in shared) == pytest.approx(alone, abs=8)
        assert max(number for _, number in shared) <= 0.6 * alone + 2


def fail():
    """Gives the processes different data, and lets one of them fail alone."""
    rank, errors = dist.get_rank(), []

    def forward(module, args, kwargs, output):
        if rank == 1 and (args[0] if args else kwargs["input_ids"]).shape[1] > 8:
            raise ValueError("broken here")

    def catch(work):
        try:
            work()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    model = make_model()
    catch(lambda: score_layers(model, text(4 + rank), progress=False))
    catch(lambda: evaluate_text(model, text(4 + rank)))
    catch(
        lambda: MultipleChoice(QUESTIONS[rank:], PreTrainedTokenizerFast.from_pretrained("tokenizer"))(model)
    )
    model.model.register_forward_hook(forward, with_kwargs=True)
    catch(lambda: score_layers(model, text(4), progress=False))
    write("errors", errors)


def test_an_error_in_one_process_is_raised_in_all(tokenizer):
    tokenizer.save_pretrained("tokenizer")
    launch(fail)
    first, second = read("errors", 0, 1)
    assert first[:3] == second[:3]
    assert all(one.startswith("LayerPruneError: The") and "differ between the 2" in one for one in first[:3])
    assert [first[3], second[3]] == ["RuntimeError: broken here", "ValueError: broken here"]


def stop(limit):
    """Scores until this process has made so many passes over calibration text."""
    model, seen = make_model(), []

    def forward(module, args, output):
        if args[0].shape[1] > 8:
            seen.append(1)
        if len(seen) > limit:
            raise KeyboardInterrupt

    model.lm_head.register_forward_hook(forward)
    try:
        table = score_layers(model, text(6), progress=False, journal="scores.part").to_dict()
    except KeyboardInterrupt:
        table = None
    write("stopped", [table, len(seen)])


def test_one_journal_serves_all_processes():
    launch(stop, 7)
    assert [table for table, _ in read("stopped", 0, 1)] == [None, None]
    assert len(Path("scores.part").read_text().splitlines()) == 3  # its head, and a turn
    launch(stop, 10**6)
    assert not Path("scores.part").exists()
    stop(10**6)
    alone, *shared = read("stopped", "alone", 0, 1)
    assert alone[1] == 30  # six batches, whole and without four layers
    assert shared == [[alone[0], 10]] * 2


def out_of_memory_once(at):
    """Scores while a forward pass of the second process has no memory, and leaves the table."""
    model, passes = make_model(), []

    def fail(*args):
        passes.append(1)
        if dist.is_initialized() and dist.get_rank() == 1 and len(passes) == at:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.register_forward_pre_hook(fail)
    table = score_layers(model, text(4, 4), "loss", progress=False)
    write(f"memory-{at}", table.to_dict())


@pytest.mark.parametrize("at", [1, 4, 9])
def test_memory_that_one_process_lacks_is_lacked_by_all(at):
    launch(out_of_memory_once, at)
    out_of_memory_once(at)
    one, *two = read(f"memory-{at}", "alone", 0, 1)
    assert two[0] == two[1]
    assert two[0]["seen"] == one["seen"]
    assert two[0]["scores"] == pytest.approx(one["scores"], rel=1e-4, abs=1e-6)


def ask_differently():
    rank = dist.get_rank()
    task = MultipleChoice(QUESTIONS[rank:], PreTrainedTokenizerFast.from_pretrained("tokenizer"))
    try:
        score_layers(make_model(), None, "task", task=task, progress=False)
    except LayerPruneError as error:
        write("asked", str(error))


def test_layers_are_not_scored_by_different_questions(tokenizer):
    tokenizer.save_pretrained("tokenizer")
    launch(ask_differently)
    assert all("The questions differ" in error for error in read("asked", 0, 1))


def write_text():
    tokenizer, rank = PreTrainedTokenizerFast.from_pretrained("tokenizer"), dist.get_rank()
    form = TextArguments(self_sequences=2), SequenceArguments(sequence_length=16), make_model().config
    writer = make_model if rank == 0 else None.__bool__
    rows = make_sequences("self", *form, tokenizer, writer=writer)
    write("text", list(rows["input_ids"]))


def test_one_process_writes_the_text_of_all(tokenizer, monkeypatch):
    monkeypatch.setenv("HF_LAYERPRUNE_CACHE", "cache")
    tokenizer.save_pretrained("tokenizer")
    launch(write_text)
    first, second = read("text", 0, 1)
    assert first == second
    assert first


def test_tensor_parallel_models_are_refused(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(type(llama), "tp_size", 2)
    for work in (
        lambda: score_layers(llama, text(1), "block_influence"),
        lambda: evaluate_text(llama, text(1)),
        lambda: copying(llama, text(1)),
        lambda: MultipleChoice(QUESTIONS, tokenizer)(llama),
    ):
        with pytest.raises(LayerPruneError, match="split over 2 processes by tensor parallelism"):
            work()
