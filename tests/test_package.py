import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_layerprune
from hf_layerprune.commands.cli import main
from hf_layerprune.reports.record import read_record
from hf_layerprune.reports.tables import markdown_table, table_rows


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_layerprune"


def test_the_import_is_light_and_silent():
    code = "import sys, hf_layerprune; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_public_name_can_be_imported():
    for name in hf_layerprune.__all__:
        assert getattr(getattr(hf_layerprune, name), "__name__", name) == name  # TASKS is a table


def test_the_public_names_are_declared_once_and_in_order():
    lines = (PACKAGE / "__init__.pyi").read_text().splitlines()
    declared = [line for line in lines if line.startswith("from ")]
    assert all(re.fullmatch(r"from \.[\w.]+ import (\w+) as \1", line) for line in declared)
    homes = [line.split()[1] for line in declared]
    assert homes == sorted(homes)
    assert len(hf_layerprune.__all__) == len(declared)
    assert hf_layerprune.__all__ == sorted(hf_layerprune.__all__)


def code_of_users():
    """What users copy: every example, and the code blocks of the README."""
    for path in (ROOT / "examples").rglob("*"):
        if path.suffix in (".py", ".sh", ".md", ".ipynb"):
            yield path.name, path.read_text()
    yield "README.md", "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))


def test_examples_and_readme_use_public_names_alone():
    seen = set()
    for name, text in code_of_users():
        assert not re.search(r"(from|import) hf_layerprune\.", text), name
        for names in re.findall(r"from hf_layerprune import (\([^)]*\)|.*)", text):
            found = set(re.findall(r"\w+", names))
            assert found <= set(hf_layerprune.__all__), name
            seen |= found
    assert {"prune", "DistillationTrainer", "load_texts"} <= seen


def test_the_package_tells_its_names_its_version_and_that_it_is_typed():
    assert {*hf_layerprune.__all__, "__version__"} == set(dir(hf_layerprune))
    assert hf_layerprune.__version__ == version("hf-layerprune")
    assert (PACKAGE / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_layerprune.nothing


def reading_order():
    """The modules, as `folder.file`, in the order in which the contributors' page names them."""
    tree = (ROOT / ".github" / "CONTRIBUTING.md").read_text().partition("## Files")[2]
    folder, found = "", []
    for indent, name, kind in re.findall(r"^( +)(\w+)(/|\.py\b)", tree, re.M):
        if kind == "/":
            folder = f"{name}."
        else:
            found.append((folder if len(indent) > 2 else "") + name)
    return found


def modules():
    """All modules but the packages' own files."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return {".".join(path.parts) for path in paths if not path.name.startswith("__")}


def imported_by(name):
    """The modules of the package that a module imports, anywhere in it."""
    text = (PACKAGE / f"{name.replace('.', '/')}.py").read_text()
    here = name.split(".")[:-1]
    for dots, path in re.findall(r"^ *from (\.+)([\w.]*) import", text, re.M):
        yield ".".join([*here[: len(here) + 1 - len(dots)], path])


def test_the_contributors_page_names_every_module_once():
    assert set(reading_order()) == modules()
    assert len(reading_order()) == len(modules())


def test_a_module_imports_only_what_stands_above_it():
    order = reading_order()
    for position, name in enumerate(order):
        assert not set(imported_by(name)) - set(order[:position]), name


def test_imports_are_seen_at_every_depth():
    assert set(imported_by("surgery.lineage")) == {"errors", "surgery.decoder"}
    assert {"errors", "distillation.objective", "surgery.lineage"} <= set(imported_by("distillation.trainer"))


def test_tests_stand_in_the_folders_of_the_package():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    tests = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert tests <= folders
    assert folders - tests == {"forward"}  # its functions are tested by those that use them


def test_the_top_level_is_as_agreed():
    known = {"pyproject.toml", "hf_layerprune", "tests", "examples", "model_cards", "README.md"}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == known


def test_the_table_in_the_readme_is_that_of_the_recorded_run():
    folder = ROOT / "model_cards" / "smollm2-27-layers"
    table = markdown_table(table_rows(read_record(folder).to_dict()))
    assert table in (ROOT / "README.md").read_text()
    assert table in (folder / "README.md").read_text()


def test_the_figures_in_readme_and_guides_are_those_of_the_records():
    path = ROOT / "examples" / "benchmarks" / "published.py"
    specification = importlib.util.spec_from_file_location("published", path)
    published = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(published)
    for page in published.PAGES:
        text = (ROOT / page).read_text()
        assert published.with_figures(text, page) == text
        assert "<!-- end of " in text
    assert len(published.published_records()) >= 8
    published.plot_healing(published.published_records(), Path("healing.png"))
    assert Path("healing.png").stat().st_size > 10_000


def test_the_published_cards_are_those_of_their_records(capsys):
    folders = [folder for folder in (ROOT / "model_cards").iterdir() if folder.is_dir()]
    for folder in folders:
        written = (folder / "README.md").read_text()
        shutil.copytree(folder, folder.name)
        assert main(["card", folder.name, "--license", "apache-2.0", "--language", "en"]) == 0
        assert Path(folder.name, "README.md").read_text() == written
        assert {path.name for path in Path(folder.name).iterdir()} == {path.name for path in folder.iterdir()}
    assert folders


def test_the_diagram_of_the_folders_is_that_of_the_imports():
    tree = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    arrows = set(re.findall(r"^  (\w+) --> (\w+)$", tree, re.M))
    imports = {
        (name.split(".")[0], other.split(".")[0])
        for name in modules()
        for other in imported_by(name)
        if "." in name and "." in other and name.split(".")[0] != other.split(".")[0]
    }
    assert arrows <= imports

    def reached(folder):
        following = {below for above, below in arrows if above == folder}
        return following.union(*map(reached, following))

    assert all(other in reached(folder) for folder, other in imports)
    assert {folder for arrow in arrows for folder in arrow} == {folder for folder, _ in imports | arrows} | {
        other for _, other in imports
    }


def test_where_a_change_goes_names_files_and_what_is_in_them():
    table = (ROOT / ".github" / "CONTRIBUTING.md").read_text().partition("## Where a change goes")[2]
    for row in re.findall(r"^\| a.*", table.partition("\n## ")[0], re.M):
        names = re.findall(r"`([\w./]+)`", row)
        files = [name for name in names if "/" in name or name.endswith(".py")]
        folders = [ROOT, PACKAGE, *(PACKAGE / Path(name).parent for name in files)]
        paths = [next((f / name for f in folders if (f / name).exists()), None) for name in files]
        assert None not in paths, row
        text = "".join(path.read_text() for path in paths if path.is_file())
        assert all(name in text for name in set(names) - set(files)), row
