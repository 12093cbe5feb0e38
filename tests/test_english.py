"""README, guides, cards, help texts and errors say things plainly: no phrase of our own, no long sentence."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from hf_layerprune.commands import flags
from hf_layerprune.commands.cli import COMMANDS
from hf_layerprune.data import arguments as data_arguments
from hf_layerprune.distillation.arguments import DistillationTrainingArguments
from hf_layerprune.pruning.arguments import PruningArguments
from hf_layerprune.recipes import arguments as recipe_arguments
from hf_layerprune.recipes.recipe import RecipeArguments


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_layerprune"
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "benchmarks" / "README.md",
    ROOT / "model_cards" / "README.md",
    *sorted((ROOT / "examples" / "guides").glob("*.md")),
    *sorted((ROOT / "model_cards").glob("*/README.md")),
]
LONGEST = 35  # words of a sentence
OWN_PHRASES = (
    "in the end",
    "what is left",
    "what it said",
    "says of a text",
    "the first's",
    "in plain words",
    "wins nothing back",
    "no GPU was at hand",
    "begin anew",
    "nobody knows",
    "what trains them",
    "the kind of text",
    "share of the tokens of a passage",
    "with the present linear map",
    "what was saved",
    "another model when loaded",
    "start anew",
    "what it can do",
    "scored least",
    "the cut cost",
    "is no plain",
    "as they are called",
)


def sentences(text):
    """The sentences of a page, without code, tables, links and lists of names."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.S)
    text = re.sub(r"^\s*(\|.*|#.*|!\[.*)$", "\n", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace(" · ", ". ")
    text = re.sub(r"^\s*- ", "\n\n", text, flags=re.M)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.:!?])\s+", " ".join(paragraph.split()))


def help_texts():
    kinds = [DistillationTrainingArguments, PruningArguments, RecipeArguments]
    for module in (flags, data_arguments, recipe_arguments):
        kinds += [one for one in vars(module).values() if dataclasses.is_dataclass(one)]
    for kind in dict.fromkeys(kinds):
        for one in dataclasses.fields(kind):
            if one.name in vars(kind).get("__annotations__", {}) and "help" in one.metadata:
                yield f"{kind.__name__}.{one.name}", one.metadata["help"]
    for name, command in COMMANDS.items():
        yield name, command.__doc__


def errors():
    """The texts of all errors, with X for each value."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LayerPruneError" and node.args:
                parts = getattr(node.args[0], "values", node.args[:1])
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
                yield f"{path.relative_to(PACKAGE)}, line {node.lineno}", text


def problems(text):
    found = [phrase for phrase in OWN_PHRASES if phrase.lower() in text.lower()]
    return found + [one for one in sentences(text) if len(one.split()) > LONGEST]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_is_plain(page):
    assert problems(page.read_text()) == []


def test_help_texts_are_plain():
    assert {name: problems(text) for name, text in help_texts() if problems(text)} == {}
    assert len(list(help_texts())) > 60


def test_errors_are_plain():
    found = dict(errors())
    assert {place: problems(text) for place, text in found.items() if problems(text)} == {}
    assert len(found) > 250


def test_the_check_sees_what_it_should():
    assert problems("It trains what is left.") == ["what is left"]
    assert len(problems("One " * 40 + "sentence. A short one.")) == 1
