import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hf_layerprune
from hf_layerprune.cli import main
from hf_layerprune.record import read_record
from hf_layerprune.report import markdown_table, table_rows


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_layerprune"


def test_the_import_is_light_and_silent():
    code = "import sys, hf_layerprune; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_public_name_can_be_imported():
    for name in hf_layerprune.__all__:
        assert getattr(hf_layerprune, name).__name__ == name


def reading_order():
    """The modules in the order in which the README's file tree names them."""
    tree = (ROOT / "README.md").read_text().partition("## Files")[2]
    return re.findall(r"^ +(\w+)\.py ", tree, re.M)


def test_the_readme_names_every_module():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(reading_order()) == modules
    assert len(reading_order()) == len(modules)


def test_a_module_imports_only_what_stands_above_it():
    order = reading_order()
    for position, name in enumerate(order):
        text = (PACKAGE / f"{name}.py").read_text()
        imported = set(re.findall(r"^ *from \.(\w+) import", text, re.M))
        below = imported - set(order[:position])
        assert not below - ({"quickstart"} if name == "cli" else set()), (name, below)


def test_the_top_level_is_as_agreed():
    known = {"pyproject.toml", "hf_layerprune", "tests", "examples", "model_cards", "README.md"}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == known


def test_the_table_in_the_readme_is_that_of_the_recorded_run():
    folder = ROOT / "model_cards" / "smollm2-27-layers"
    table = markdown_table(table_rows(read_record(folder)))
    assert table in (ROOT / "README.md").read_text()
    assert table in (folder / "README.md").read_text()


def test_the_figures_in_the_readme_are_those_of_the_records():
    path = ROOT / "examples" / "benchmarks" / "published.py"
    specification = importlib.util.spec_from_file_location("published", path)
    published = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(published)
    readme = (ROOT / "README.md").read_text()
    assert published.with_figures(readme) == readme
    assert len(published.published_records()) >= 8


def test_the_published_cards_are_those_of_their_records(capsys):
    folders = [folder for folder in (ROOT / "model_cards").iterdir() if folder.is_dir()]
    for folder in folders:
        written = (folder / "README.md").read_text()
        shutil.copytree(folder, folder.name)
        assert main(["card", folder.name, "--license", "apache-2.0", "--language", "en"]) == 0
        assert Path(folder.name, "README.md").read_text() == written
        assert {path.name for path in Path(folder.name).iterdir()} == {path.name for path in folder.iterdir()}
    assert folders
