import json
from pathlib import Path

import pytest

from hf_layerprune import LayerPruneError, MultipleChoice
from hf_layerprune.commands.cli import main
from hf_layerprune.evaluation import evaluate as evaluation
from hf_layerprune.evaluation import lm_eval as through_lm_eval
from hf_layerprune.evaluation.comparison import task_scores
from hf_layerprune.evaluation.lm_eval import run_lm_eval
from hf_layerprune.evaluation.tasks import TASKS, chance, load_task

from ..conftest import make_model


# Two rows of each data set as it is published.
ROWS = {
    "hellaswag": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "[header] How to bake [title] Knead the  dough.",
            "ctx_b": "then you",
            "endings": ["wait [step] an hour.", "throw it away. ", "eat.", "sing a song to it"],
            "label": "0",
        },
        {"activity_label": "Rest", "ctx_a": "He", "ctx_b": "", "endings": ["slept.", "ran."], "label": "1"},
    ],
    "arc_easy": [
        {
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {
            "question": "Which is wet?",
            "choices": {"text": ["water", "sand"], "label": ["1", "2"]},
            "answerKey": "1",
        },
    ],
    "piqa": [
        {"goal": "Cut bread", "sol1": "Use a knife.", "sol2": "Use a spoon. ", "label": 0},
        {"goal": "Dry hands", "sol1": "Use water.", "sol2": "Use a towel", "label": 1},
    ],
    "lambada_openai": [
        {"text": "The dog barked, and then again it barked"},
        {"text": "One two three one two\n\nthree"},
    ],
    "sciq": [
        {
            "question": "What do plants need?",
            "distractor1": "salt",
            "distractor2": "sand",
            "distractor3": "noise",
            "correct_answer": "light",
            "support": " Plants grow in light.",
        },
        {
            "question": "What is H2O?",
            "distractor1": "gold",
            "distractor2": "air",
            "distractor3": "fire",
            "correct_answer": "water",
            "support": "",
        },
    ],
    "boolq": [
        {"question": "is snow cold", "passage": "Snow is cold.", "answer": True},
        {"question": "is fire cold", "passage": "Fire is hot.", "answer": False},
    ],
}


@pytest.fixture
def files():
    for name, rows in ROWS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: f"{name}={name}.jsonl" for name in ROWS}


def test_sources_are_asked_in_the_words_of_the_field(files):
    bread = load_task(files["hellaswag"])[0]
    assert bread.context == "Baking bread: How to bake. Knead the dough. Then you"
    assert bread.choices[:2] == [" wait an hour.", " throw it away."]
    assert load_task(files["arc_easy"])[1].answer == 0
    assert chance(load_task(files["arc_easy"])) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert load_task(files["lambada_openai"], 1)[0].choices == [" barked"]
    assert chance(load_task(files["lambada_openai"])) == 0
    assert load_task(files["boolq"])[0].context == "Snow is cold.\nQuestion: is snow cold?\nAnswer:"
    assert [question.answer for question in load_task(files["boolq"])] == [1, 0]
    assert load_task(files["sciq"])[0].context.startswith("Plants")


def test_lm_eval_finds_the_same(files, tokenizer):
    """Choice by choice: the same questions right, of six tasks, for models that differ."""
    found = []
    for seed in range(3):
        model = make_model("llama", seed=seed, max_position_embeddings=512)
        right = {}
        for name, task in files.items():
            read = MultipleChoice(load_task(task), tokenizer, normalize=TASKS[name].normalize).read(model)
            right[name] = [answer.right for answer in read]
        own = task_scores(right, {name: chance(load_task(task)) for name, task in files.items()})
        assert run_lm_eval(model, tokenizer, list(files.values())) == own
        found.append(json.dumps(own))
    assert len(set(found)) > 1


def test_tasks_that_lm_eval_does_not_know_are_refused(files, llama, tokenizer):
    with pytest.raises(LayerPruneError, match="lm-eval has no task helaswag"):
        run_lm_eval(llama, tokenizer, ["helaswag=hellaswag.jsonl"])
    with pytest.raises(LayerPruneError, match=r"No such file: none\.jsonl"):
        run_lm_eval(llama, tokenizer, ["hellaswag=none.jsonl"])


def test_what_lm_eval_does_not_know_is_said_before_any_model_is_read(
    files, llama, tokenizer, monkeypatch, capsys
):
    llama.save_pretrained("model")
    tokenizer.save_pretrained("model")
    monkeypatch.setattr(evaluation, "evaluate_model", lambda *args: pytest.fail("read"))
    words = ["evaluate", "model", "--data", "piqa.jsonl", "--data_field", "goal", "--lm_eval", "True"]
    assert main([*words, "--tasks", "helaswag=hellaswag.jsonl"]) == 2
    assert "lm-eval has no task helaswag" in capsys.readouterr().err


def test_a_row_of_another_task_is_refused(files):
    with pytest.raises(LayerPruneError, match=r"piqa\.jsonl, row 1: no row of sciq"):
        load_task("sciq=piqa.jsonl")


def test_shares_are_not_taken_for_right_answers(llama, tokenizer, monkeypatch):
    samples = {"truthfulqa_mc2": [{"acc": 0.31, "resps": [1, 2]}, {"acc": 0.7, "resps": [1, 2]}]}
    monkeypatch.setattr(through_lm_eval, "lm_eval_samples", lambda *args: samples)
    with pytest.raises(LayerPruneError, match="acc of lm-eval's truthfulqa_mc2 is not 0 or 1 but a share"):
        run_lm_eval(llama, tokenizer, ["truthfulqa_mc2"])


@pytest.mark.parametrize(
    "row",
    [
        {"context": "1+1=", "choices": [1, 2]},
        {"context": "1+1=", "choices": "yes"},
        {"context": "1+1=", "choices": ["2", " "]},
        {"context": "1+1=", "choices": ["2", "3"], "answer": "1"},
        {"context": "1+1=", "choices": ["2", "3"], "answer": 2},
        {"context": "1+1=", "choices": []},
    ],
)
def test_a_question_of_ones_own_that_cannot_be_asked_is_refused(tmp_path, row):
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(LayerPruneError, match="row 1: no row of questions"):
        load_task(f"questions={tmp_path / 'own.jsonl'}")
