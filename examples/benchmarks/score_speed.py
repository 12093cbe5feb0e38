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
from pathlib import Path

import torch

from hf_layerprune import score_layers
from hf_layerprune.commands.quickstart import load_embedded_model
from hf_layerprune.data import load_texts, make_batches, targets_of, token_blocks
from hf_layerprune.forward.hooks import undisturbed
from hf_layerprune.forward.lm_head import Reader, unit_losses
from hf_layerprune.reports.machine import surroundings
from hf_layerprune.surgery.removal import possible_cuts


text, target = sys.argv[1:3]
sizes = [int(size) for size in sys.argv[3:]]
sequences, length, samples = [*sizes, *(128, 128, 20)[len(sizes) :]]

model, tokenizer = load_embedded_model()
model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
blocks = token_blocks(load_texts(text), tokenizer, length, limit=sequences * 40).shuffle(seed=0)


def sample(seed):
    chosen = blocks.shuffle(seed=seed).select(range(sequences))
    return [{k: v.to(model.device) for k, v in b.items()} for b in make_batches(chosen, 4)]


def full_passes(losses, batches):
    """One pass over all batches for each layer; `losses` gives a batch's summed losses, part by part."""
    with undisturbed(model):
        count = sum(int(targets_of(batch)[0].sum()) for batch in batches)

        def total():
            return [x for batch in batches for x in losses(batch)]

        dense, scores = total(), {}
        for layer, cut in possible_cuts(model, range(1, 29))[0].items():
            with cut:
                scores[layer] = sum(a - b for a, b in zip(total(), dense, strict=True)) / count
    return scores


def plain(batch):
    """The way of SLEB and of Shortened LLaMA: the model's own loss."""
    output = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False)
    return [float(output.loss) * int(targets_of(batch)[0].sum())]


def exact(batch):
    """As plain, but reading logits as hf_layerprune does."""
    with torch.no_grad():
        return unit_losses(reader, batch).tolist()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def optipfair():
    """Cosine distance of each layer's input and output, as optipfair 0.4 has it."""
    scores = analyze_layer_importance(model, batches, "model.layers", show_progress=False)
    return {layer: score for layer, score in scores.items() if 0 < layer < 29}


batches = sample(0)
score_layers(model, batches[:1], progress=False)  # the first passes are slow
with undisturbed(model):
    reader = Reader(model, batches[0]["input_ids"])
ways = {
    "block influence": lambda: score_layers(model, batches, "block_influence", progress=False).scores,
    "racing 0.95": lambda: score_layers(model, batches, racing=0.95, progress=False),
    "racing 0.99": lambda: score_layers(model, batches, racing=0.99, progress=False),
    "cached states": lambda: score_layers(model, batches, progress=False).scores,
    "naive, our loss": lambda: full_passes(exact, batches),
    "naive": lambda: full_passes(plain, batches),
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
measured = {"sequences": sequences, "length": length, **surroundings(model), "rows": rows}
measured |= {"largest difference": largest, "samples": compared}
Path(target).write_text(json.dumps(measured, indent=1) + "\n")
