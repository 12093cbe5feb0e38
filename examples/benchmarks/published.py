"""Cards and records of the runs of published.sh into model_cards/, and README's table and plot from them.

    python examples/benchmarks/published.py [OUTPUT EVALUATION.json...]

Without arguments, table and plot alone, from the records that are in model_cards/.
"""

import json
import shutil
import sys
from pathlib import Path

from hf_layerprune.cli import main as hf_layerprune
from hf_layerprune.evaluation import share_kept
from hf_layerprune.record import Record, read_record
from hf_layerprune.report import markdown_table, plot_results, results_rows


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
START, END = "<!-- results -->\n", "<!-- end of results -->"


def published_records() -> dict[str, Record]:
    """The runs in model_cards/ that were evaluated, by depth, the default recipe first, then the best."""
    found = {folder.name: read_record(folder) for folder in CARDS.iterdir() if folder.is_dir()}
    runs = {name: record for name, record in found.items() if record and "evaluation" in record}

    def place(name: str) -> tuple[int, bool, float]:
        measured = runs[name]["evaluation"]
        kept = share_kept(measured["dense"], measured["model"])["share"]
        return measured["model"]["layers"], not name.startswith("default"), -kept

    return {name: runs[name] for name in sorted(runs, key=place)}


def with_table(readme: str) -> str:
    """README with the table of these records in its place."""
    before, _, rest = readme.partition(START)
    return (
        before
        + START
        + markdown_table(results_rows(published_records()))
        + "\n"
        + END
        + rest.partition(END)[2]
    )


def add_card(folder: Path, evaluation: str) -> None:
    words = ["--evaluation", evaluation, "--base_model", BASE, "--license", "apache-2.0", "--language", "en"]
    if hf_layerprune(["card", str(folder), *words]):
        raise SystemExit(1)
    target = CARDS / folder.name
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.suffix == ".png" or file.name in ("README.md", "layer_pruning.json"):
            shutil.copy(file, target / file.name)


def main(output: Path | None, evaluations: list[str]) -> None:
    for evaluation in evaluations:
        names = [Path(name).name for name in json.loads(Path(evaluation).read_text())["models"]][1:]
        for name in names:
            add_card(output / name, evaluation)
    plot_results(published_records(), CARDS / "results.png")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, sys.argv[2:])
