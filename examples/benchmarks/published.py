"""Cards and records of the runs of published.sh into model_cards/, and the figures of README and guides.

    python examples/benchmarks/published.py [OUTPUT EVALUATION.json...]

Without arguments, the figures alone: of the records in model_cards/, and of what the other scripts and
`hf-layerprune study` wrote into measured/ here.
"""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from hf_layerprune import markdown_table, plot_results, read_record, results_rows, share_kept, tasks_done


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MEASURED = Path(__file__).parent / "measured"

STEPS = {  # distill_step.py's ways in README's words
    "all": "`DistillationTrainer`, all trained",
    "all, compiled": "with `torch_compile=True`",
    "around_cuts": 'with `trainable="around_cuts"`',
    "lora": "with `peft_config`",
    "written": "with written teacher outputs (64 tokens)",
    "modelopt": "nvidia-modelopt {version} `KDTrainer`",
    "trl": "trl {version} `GKDTrainer`, on given text",
    "silverspoon": "silverspoon-kd {version}",
    "plain Trainer, no teacher": "plain `Trainer`, no teacher",
}


def published_records() -> dict[str, dict[str, Any]]:
    """The runs in model_cards/ that were evaluated, by depth, the default recipe first, then the best."""
    found = {folder.name: read_record(folder) for folder in CARDS.iterdir() if folder.is_dir()}
    runs = {name: record.to_dict() for name, record in found.items() if record and record.evaluation}

    def place(name: str) -> tuple[int, bool, float]:
        found = runs[name]["evaluation"]
        layers = found["model"]["layers"]
        return (
            layers,
            name != f"default-{layers}",
            -share_kept(found["dense"], found["model"])["share"],
        )

    return {name: runs[name] for name in sorted(runs, key=place)}


def seeds() -> str:
    """How far the linear map is ahead where it and others were trained on the text in two orders.

    Each question counts by the mean over both orders, in pairs.
    """
    runs = published_records()
    done = tasks_done(runs["linear-map-23"]["evaluation"]["dense"])

    def right(name: str, task: str) -> np.ndarray:
        both = (runs[run]["evaluation"]["model"]["tasks"][task]["right"] for run in (name, f"{name}-seed-7"))
        return np.mean([[*map(float, one)] for one in both], axis=0)

    ahead = []
    for other in ("sleb-23", "shortgpt-23"):
        pairs = [right("linear-map-23", task) - right(other, task) for task in done]
        mean = statistics.fmean(pair.mean() for pair in pairs)
        error = math.sqrt(sum(pair.var(ddof=1) / len(pair) for pair in pairs)) / len(pairs)
        ahead.append(f"`{other}` by {mean:.4f} ± {error:.4f}")
    words = f"Over both orders of the text, `linear-map-23` is ahead of {' and of '.join(ahead)}."
    return textwrap.fill(words, 120)


def measured(name: str) -> dict[str, Any]:
    return json.loads((MEASURED / name).read_text())


def scoring() -> str:
    """How long each way of scoring took, and how often racing chose what the full scores choose."""
    found = measured("score_speed.json")
    took = {row["way"]: row for row in found["rows"]}
    samples, full = found["samples"], took["cached states"]
    same = sum(one["full"] == one["racing"] for one in samples)
    near = sum(one["within an error"] for one in samples)
    raced = statistics.median(one["ratio"] for one in samples)
    same, near = ("all" if count == len(samples) else count for count in (same, near))
    other = took["block influence"]["layer"]
    chose = f"Block influence chose layer {other}, and the others chose layer {full['layer']}."
    chose = "All chose the same layer." if other == full["layer"] else chose
    sentences = (
        f"One run scored all layers on {found['sequences']} C4 sequences of {found['length']} tokens, with "
        f"{found['machine']['cpu_threads']} threads. It took {took['naive']['seconds']:.0f} s with full "
        f"passes, {full['seconds']:.0f} s with cached states, {took['racing 0.95']['seconds']:.0f} s with "
        f"racing and {took['block influence']['seconds']:.0f} s with block influence. {chose} On "
        f"{len(samples)} other samples racing was {raced:.1f} times as fast as cached states (median). In "
        f"{same} of them it chose the same layer as scoring without racing. In {near} of them the layer that "
        "racing chose had a score within one standard error of the lowest."
    )
    return textwrap.fill(sentences, 120)


def distilling() -> str:
    """Speed and memory of a step of distillation, ours and others', as a table."""
    rows = {row["way"]: row for row in measured("distill_step.json")["rows"]}
    keys = ("tokens_per_second", "weights_mb", "peak_mb")
    table = [["", "tokens/s", "weights MB", "peak above MB"]]
    for way, words in STEPS.items():
        table.append([words.format(**rows[way]), *(f"{rows[way][key]:.0f}" for key in keys)])
    return markdown_table(table)


def healing() -> str:
    """What each loss leaves after the same steps, from the study of losses."""
    found = measured("losses/study.json")
    rows, settings = found["rows"], found["settings"]
    table = [
        ["loss", "loss per token after healing"],
        *([row["losses"], f"{row['healed']:.3f}"] for row in rows),
    ]
    sentence = (
        f"{settings['remove']} layers removed, {settings['tokens']:,} healing tokens, measured on "
        f"{settings['heldout']} ({rows[0]['cut']:.3f} before healing)."
    )
    return f"{textwrap.fill(sentence, 120)}\n\n{markdown_table(table)}"


def plot_healing(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the accuracy of SmolLM2 with 23 layers over tokens and seconds, with and without reconstruction.

    The seconds are those of `default-23` for as many tokens, since the runs were made on other machines.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    run, long = records["default-23"]["phases"][-1], measured("gpu_heal.json")
    reconstruction = run["reconstruction"]
    rates = [  # seconds for a token of distillation, and of reconstruction
        (run["seconds"] - reconstruction["seconds"]) / healing_tokens(records["default-23"]),
        reconstruction["seconds"] / reconstruction["tokens"],
    ]

    def kept(name: str) -> dict[str, float]:
        found = records[name]["evaluation"]
        return share_kept(found["dense"], found["model"])

    healed = long["heal"]["tokens"], long["heal"]["reconstruction"]["tokens"]
    tokens = healing_tokens(records["default-23"]), reconstruction["tokens"]
    lines = {
        "with reconstruction": [(tokens, kept("default-23")), (healed, long["evaluation"]["model"]["kept"])],
        "without reconstruction": [
            ((healing_tokens(records[name]), 0), kept(name))
            for name in ("linear-map-23", "linear-map-23-long")
        ],
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for label, points in lines.items():
        shares = [100 * share["share"] for _, share in points]
        errors = [100 * share["standard_error"] for _, share in points]
        places = [
            [spent[0] for spent, _ in points],
            [spent[0] * rates[0] + spent[1] * rates[1] for spent, _ in points],
        ]
        for axes, place in zip(panels, places, strict=True):
            axes.errorbar(place, shares, errors, fmt="o-", capsize=3, label=label)
    for axes, name in zip(panels, ("tokens of distillation", "seconds on two CPU cores"), strict=True):
        axes.axhline(
            100 * kept("replaceme-23")["share"], color="gray", linestyle=":", label="linear map alone"
        )
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy above chance (% of dense)")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def healing_tokens(record: dict[str, Any]) -> int:
    return record["recipe"]["max_steps"] * 4 * 256  # the same batch in all published runs


def gpu() -> str:
    """What gpu.py found: whether its checks hold, the speed of a step, and a model healed for two minutes."""
    checks, speed, healed = (measured(f"gpu_{part}.json") for part in ("checks", "speed", "heal"))
    agree = sum(one["ok"] for one in checks["checks"].values())
    steps, found, run = speed["speed"], healed["evaluation"], healed["heal"]
    distil, plain = steps["distillation"], steps["plain Trainer"]
    kept = found["model"]["kept"]
    sentences = (
        f"On an {healed['device']} ([script](examples/benchmarks/gpu.py)), {agree} of "
        f"{len(checks['checks'])} correctness checks pass. A distillation step with the shape of "
        f"Qwen2.5-3B and {steps['batch']} x {steps['length']} tokens takes {distil['step_seconds']:.2f} s "
        f"and {distil['peak_gib']:.0f} GiB. A plain Trainer takes {plain['step_seconds']:.2f} s but "
        f"{plain['peak_gib']:.0f} GiB, because it holds all logits at once. "
        f"SmolLM2-135M with 23 of 30 layers was distilled on {run['tokens']:,} tokens in "
        f"{run['seconds']:.0f} s. It has "
        f"{100 * kept['share']:.1f}% ± {100 * kept['standard_error']:.1f}% of the dense model's accuracy "
        f"above chance, and a copy accuracy of {found['model']['copying']:.3f}."
    )
    return textwrap.fill(sentences, 120)


SHORT = (
    "default-23",
    "linear-map-23",
    "shortgpt-23",
    "iterative-23",
    "replaceme-23",
)  # the rows of README
PAGES = (
    "README.md",
    "model_cards/README.md",
    "examples/guides/choosing_layers.md",
    "examples/benchmarks/README.md",
)


def with_figures(text: str, page: str = "README.md") -> str:
    """A page with what was measured in its places."""
    records = published_records()
    if page == "README.md":
        records = {name: records[name] for name in SHORT}
    figures = {
        "results": markdown_table(results_rows(records)),
        "seeds": seeds(),
        "scoring": scoring(),
        "distilling": distilling(),
        "healing": healing(),
        "gpu": gpu(),
    }
    for name, figure in figures.items():
        place = re.compile(rf"^<!-- {name} -->\n.*?<!-- end of {name} -->", re.M | re.S)
        shown = f"<!-- {name} -->\n{figure}\n<!-- end of {name} -->"
        text = place.sub(lambda _, shown=shown: shown, text)
    return text


def add_card(folder: Path, evaluation: str) -> None:
    words = ["--evaluation", evaluation, "--base_model", BASE, "--license", "apache-2.0", "--language", "en"]
    subprocess.run([sys.executable, "-m", "hf_layerprune", "card", str(folder), *words], check=True)
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
    plot_healing(published_records(), CARDS / "healing.png")
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_figures(path.read_text(), page))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, sys.argv[2:])
