"""Makes questions of zero-shot tasks, with the prompts of lm-evaluation-harness."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.sources import load_rows
from ..errors import LayerPruneError, choose_from
from .multiple_choice import Question


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A zero-shot task.

    Args:
        dataset (`str`): hub id of the data set.
        config (`str` or `None`): the configuration of the data set.
        split (`str`): the split with the questions.
        question (`Callable`): makes a question from a row.
        normalize (`bool`): whether to compare log-likelihoods per character (lm-eval's `acc_norm`), not those
            of the whole choice (`acc`).
    """

    dataset: str
    config: str | None
    split: str
    question: Callable[[Row], Question]
    normalize: bool


def hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [" " + _without_brackets(ending) for ending in row["endings"]]
    return Question(_without_brackets(context), endings, int(row["label"]))


def arc(row: Row) -> Question:
    choices = [" " + choice for choice in row["choices"]["text"]]
    answer = list(row["choices"]["label"]).index(row["answerKey"])
    return Question(f"Question: {row['question']}\nAnswer:", choices, answer)


def piqa(row: Row) -> Question:
    context = f"Question: {row['goal']}\nAnswer:"
    return Question(context, [" " + row["sol1"], " " + row["sol2"]], int(row["label"]))


def sciq(row: Row) -> Question:
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return Question(context, [" " + row[name] for name in names], 3)


def boolq(row: Row) -> Question:
    answer = row["label"] if "label" in row else row["answer"]  # SuperGLUE, or the original data
    return Question(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", [" no", " yes"], int(answer))


def last_word(row: Row) -> Question:
    context, _, word = row["text"].rpartition(" ")
    return Question(context, [" " + word])


def own(row: Row) -> Question:
    choices, answer = row["choices"], row.get("answer", 0)
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise ValueError("choices must be a list of texts, none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer!r}: it must be the index of the right choice, from 0")
    return Question(row["context"], choices, answer)


def _without_brackets(text: str) -> str:
    """Returns a text of HellaSwag without the markup of WikiHow articles."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


TASKS = {
    "hellaswag": Task("Rowan/hellaswag", None, "validation", hellaswag, True),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", arc, False),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", arc, True),
    "piqa": Task("baber/piqa", None, "validation", piqa, True),
    "lambada_openai": Task("EleutherAI/lambada_openai", "default", "test", last_word, False),
    "sciq": Task("allenai/sciq", None, "test", sciq, False),
    "boolq": Task("aps/super_glue", "boolq", "validation", boolq, False),
    "questions": Task("", None, "", own, True),  # the user's own file, with context, choices and answer
}


def split_name(task: str) -> tuple[str, str | None]:
    """Returns the name and the file of a task given as `name` or `name=file`.

    Raises:
        LayerPruneError: there is no such task.
    """
    name, _, file = task.partition("=")
    if name not in TASKS:
        raise LayerPruneError(
            f"There is no task {name!r} built in. {choose_from(name, TASKS)}, or add --lm_eval True for the "
            "tasks of lm-eval."
        )
    if not file and not TASKS[name].dataset:
        raise LayerPruneError(f"{name} has no data set on the hub. Give a file with its rows: {name}=FILE.")
    return name, file or None


def load_task(task: str, limit: int | None = None) -> list[Question]:
    """Returns the questions of a task.

    Args:
        task (`str`): a name in `TASKS`, whose rows are downloaded from the hub. Or `name=file` with the rows
            in a JSON Lines file.
        limit (`int`, *optional*): number of questions. Default: all.

    Raises:
        LayerPruneError: there is no such task, file or data set, or a row does not fit the task.
    """
    name, file = split_name(task)
    kind = TASKS[name]
    rows = load_rows(file) if file else load_rows(kind.dataset, kind.split, kind.config)
    questions = []
    for number, row in enumerate(rows.select(range(min(limit or len(rows), len(rows)))), 1):
        try:
            questions.append(kind.question(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise LayerPruneError(
                f"{file or kind.dataset}, row {number}: no row of {name}: {error!r}"
            ) from error
    return questions


def chance(questions: Sequence[Question]) -> float:
    """Returns the accuracy of guessing. A question with one choice counts as 0."""
    guesses = [1 / len(question.choices) for question in questions if len(question.choices) > 1]
    return sum(guesses) / len(questions)
