"""How fast is each way to find the least important layer of SmolLM2-135M, and do they find the same one?

    python examples/benchmarks/score_speed.py TEXT.jsonl FOUND.json [SEQUENCES] [LENGTH] [SAMPLES]

All ways read the same sequences, side by side in one run: leave-one-out with a full pass for each layer,
the same from cached states, racing, block influence, and where it is installed optipfair's importance. Then
racing is compared with the full scores on as many other samples of the text as asked for.
"""

import json
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from hf_layerprune import (
    evaluate_text,
    load_embedded_model,
    load_texts,
    make_batches,
    score_layers,
    token_sequences,
)


text, target = sys.argv[1:3]
sizes = [int(size) for size in sys.argv[3:]]
sequences, length, samples = [*sizes, *(128, 128, 20)[len(sizes) :]]

model, tokenizer = load_embedded_model()
model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
blocks = token_sequences(load_texts(text), tokenizer, length, limit=sequences * 40).shuffle(seed=0)


def sample(seed):
    chosen = blocks.shuffle(seed=seed).select(range(sequences))
    return [{k: v.to(model.device) for k, v in b.items()} for b in make_batches(chosen, 4)]


def full_passes(loss):
    """The rise of `loss`, a function of the batches, without each layer in turn."""
    layers, dense, scores = model.model.layers, loss(batches), {}
    for layer in range(1, len(layers) - 1):
        model.model.layers = nn.ModuleList(one for i, one in enumerate(layers) if i != layer)
        scores[layer] = loss(batches) - dense
    model.model.layers = layers
    return scores


@torch.no_grad()
def plain(batches):
    """The way of SLEB and of Shortened LLaMA: the model's own loss."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        predicted = ids[:, 1:].numel()
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * predicted
        count += predicted
    return total / count


def exact(batches):
    """As plain, but with logits as hf_layerprune reads them."""
    return evaluate_text(model, batches)["loss"]


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def optipfair():
    """Cosine distance of each layer's input and output, as optipfair 0.4 has it."""
    scores = analyze_layer_importance(model, batches, "model.layers", show_progress=False)
    return {layer: score for layer, score in scores.items() if 0 < layer < 29}


batches = sample(0)
score_layers(model, batches[:1], progress=False)  # the first passes are slow
ways = {
    "block influence": lambda: score_layers(model, batches, "block_influence", progress=False).scores,
    "racing 0.95": lambda: score_layers(model, batches, racing=0.95, progress=False),
    "racing 0.99": lambda: score_layers(model, batches, racing=0.99, progress=False),
    "cached states": lambda: score_layers(model, batches, progress=False).scores,
    "naive, our loss": lambda: full_passes(exact),
    "naive": lambda: full_passes(plain),
}
try:
    from optipfair import analyze_layer_importance
except ImportError:
    print("optipfair is not installed: left out")
else:
    ways = {"optipfair": optipfair, **ways}
print(f"{sequences} sequences of {length} tokens, {torch.get_num_threads()} threads", flush=True)
found, seconds, rows = {}, {}, []
for name, way in ways.items():
    began = time.perf_counter()
    found[name] = way()
    seconds[name] = time.perf_counter() - began
    table = found[name]
    best = table.ranking()[0] if name.startswith("racing") else min(table, key=table.get)
    rows.append({"way": name, "seconds": round(seconds[name], 1), "layer": best, "peak_mb": round(peak())})
    print(f"{name:16s} {seconds[name]:7.1f} s   layer {best:2d}   peak {peak():.0f} MiB", flush=True)
for name in ways:
    print(f"naive / {name}: {seconds['naive'] / seconds[name]:.2f}")
largest = max(abs(found["naive, our loss"][i] - found["cached states"][i]) for i in found["naive"])
print(f"largest difference between cached scores and those of full passes: {largest:.1g}", flush=True)

compared = []
for seed in range(1, samples + 1):
    batches = sample(seed)
    began = time.perf_counter()
    full = score_layers(model, batches, progress=False)
    half = time.perf_counter()
    raced = score_layers(model, batches, racing=0.95, progress=False)
    ratio = (half - began) / (time.perf_counter() - half)
    best, chosen = full.ranking()[0], raced.ranking()[0]
    within = full.scores[chosen] <= full.scores[best] + full.errors[best]
    compared.append({"full": best, "racing": chosen, "within an error": within, "ratio": round(ratio, 2)})
    print(f"sample {seed}: full {best}, racing {chosen}, cached / racing {ratio:.2f}", flush=True)
if samples:
    same = sum(one["full"] == one["racing"] for one in compared)
    near = sum(one["within an error"] for one in compared)
    print(f"racing chose the same layer in {same} of {samples}, one within a standard error in {near};")
    print(f"cached / racing: median {statistics.median(one['ratio'] for one in compared):.2f}")
versions = {name: version(name) for name in ("torch", "transformers", "hf-layerprune")}
machine = {"device": str(model.device), "cpu_threads": torch.get_num_threads()}
measured = {"sequences": sequences, "length": length, "versions": versions, "machine": machine, "rows": rows}
measured |= {"largest difference": largest, "samples": compared}
Path(target).write_text(json.dumps(measured, indent=1) + "\n")
