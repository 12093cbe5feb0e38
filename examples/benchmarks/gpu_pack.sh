#!/usr/bin/env bash
# Gathers what gpu.py needs on a GPU machine without a network that has PyTorch: wheels, the model and tokens, in
# files of at most 55 MB.
#
#   examples/benchmarks/gpu_pack.sh MODEL TEXT.jsonl OUT [PYTHON_VERSION]
#
# MODEL is a folder of a model and its tokenizer. TEXT.jsonl is from text_mix.py. PYTHON_VERSION is that of the
# other machine (3.12). There, in a checkout of this repository:
#
#   pip install --no-index --no-deps --target /tmp/site OUT/wheels/*.whl && export PYTHONPATH=/tmp/site
#   cat OUT/model.tar.xz.* | tar -xJ -C /tmp && cat OUT/tokens.npy.* > /tmp/tokens.npy
#   python examples/benchmarks/gpu.py heal out --model /tmp/MODEL --tokens /tmp/tokens.npy --seconds 300
set -euo pipefail

model=$1 text=$2 output=$3 python=${4:-3.12}
mkdir -p "$output/wheels"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

platforms=()
for version in 2_28 2_27 2_17 2014 1; do
  platforms+=(--platform "manylinux${version/#2_/_2_}_x86_64")
done
for package in transformers tokenizers huggingface_hub datasets dill multiprocess evaluate optimum peft accelerate; do
  version=$(python -c "from importlib.metadata import version; print(version('$package'))")
  pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp "${platforms[@]}" \
    -d "$output/wheels" "$package==$version"
done
pip wheel -q --no-deps -w "$output/wheels" "$(dirname "$0")/../.."

python - "$model" "$text" "$work/tokens.npy" <<'PYTHON'
import sys

import numpy as np
from transformers import AutoTokenizer

from hf_layerprune import load_texts, token_sequences

model, text, output = sys.argv[1:]
rows = token_sequences(load_texts(text), AutoTokenizer.from_pretrained(model), 512)["input_ids"]
ids = np.array(rows, dtype=np.uint16 if np.max(rows) < 2**16 else np.uint32)
np.random.default_rng(0).shuffle(ids)
np.save(output, ids)
PYTHON
split -b 55M -d "$work/tokens.npy" "$output/tokens.npy."
tar -cJ -C "$(dirname "$model")" "$(basename "$model")" | split -b 55M -d - "$output/model.tar.xz."
ls -l "$output" "$output/wheels"
