#!/usr/bin/env bash
# The recipes side by side on one model, with the same text, tokens and schedule, and their evaluation.
#
#   examples/benchmarks/compare_recipes.sh MODEL TEXT OUTPUT LAYERS EVALUATION_TEXT [TASK=FILE...]
#
# TEXT is from text_mix.py. STEPS (245) are of 4 x 256 tokens, in the order of SEED (42), at a peak learning rate of RATE
# (9.7e-5, the default's for SmolLM2-135M; 9.2e-6 for Qwen2.5-Coder-0.5B, 1.7e-5 for Gemma 3 270M). RECIPES lists the
# runs to make, separated by spaces (all). JOBS (1) of them go on at once: a large GPU has room for 16. With more than one
# job, the measured speeds mean nothing. LIMIT (2000) questions of each task are asked. On a CPU without bfloat16 units,
# set DTYPE (bfloat16) to float32. What is finished in OUTPUT is left alone. OUTPUT/evaluation.json holds the result.
set -euo pipefail

model=$1 text=$2 output=$3 layers=$4 evaluation=$5
shift 5
steps=${STEPS:-245} jobs=${JOBS:-1} wanted=" ${RECIPES:-} " limit=${LIMIT:-2000} dtype=${DTYPE:-bfloat16}
[[ $dtype == bfloat16 ]] && bf16=True || bf16=False
depth=$(python -c "import sys; from transformers import AutoConfig as C; print(C.from_pretrained(sys.argv[1]).num_hidden_layers)" "$model")
measure=(--data "$evaluation" --sequence_length 256 --max_sequences 64 --dtype "$dtype")
if (( $# )); then measure+=(--limit "$limit" --tasks "$@"); fi
mkdir -p "$output/parts"

evaluate() { # NAME MODEL
  hf-layerprune evaluate "$2" "${measure[@]}" --json "$output/parts/$1.json"
}

start() { # COMMAND...
  while (( $(jobs -rp | wc -l) >= jobs )); do wait -n || true; done
  "$@" &
}

train() { # NAME RECIPE FLAGS...
  local name=$1 recipe=$2
  shift 2
  if [[ ! -f $output/$name/config.json ]]; then
    hf-layerprune run "$recipe" --model "$model" --target_layers "$layers" --data "$text" --output_dir "$output/$name" \
      --calibration_sequences 128 --heldout_sequences 32 --sequence_length 256 --save_strategy no --report_to none \
      --disable_tqdm True --bf16 "$bf16" --seed "${SEED:-42}" "$@"
  fi
  [[ -f $output/parts/$name.json ]] || evaluate "$name" "$output/$name"
}

run() { # NAME RECIPE FLAGS...
  [[ $wanted == "  " || $wanted == *" $1 "* ]] || return 0
  start train "$@" > "$output/$1.log" 2>&1
}

healing=(--max_steps "$steps" --per_device_train_batch_size 4 --learning_rate "${RATE:-9.7e-5}" --lr_scheduler_type cosine
  --lr_scheduler_kwargs '{}' --warmup_steps 0.05 --weight_decay 0 --logging_steps 7)
phases=(--steps_per_phase $((steps / (depth - layers))) --calibration_sequences 32)
around=(--reconstruction_layers 3 --repeat_share 0) alone=(--reconstruction_layers 0 --repeat_share 0)

[[ -f $output/parts/dense.json ]] || start evaluate dense "$model" > "$output/dense.log" 2>&1
run default default "${healing[@]}"
run block-reconstruction default "${healing[@]}" --replacement none "${around[@]}"
run linear-map default "${healing[@]}" --replacement linear "${alone[@]}" # refused for models that normalise the feed-forward output
run linear-map-reconstruction default "${healing[@]}" --replacement linear "${around[@]}" # also refused for them
run block default "${healing[@]}" --replacement none "${alone[@]}"
run block-raced default "${healing[@]}" --replacement none "${around[@]}" --block_candidates 3
run shortgpt shortgpt "${healing[@]}"
run iterative iterative-small "${healing[@]}" "${phases[@]}"
run iterative-reconstruction iterative-small "${healing[@]}" "${phases[@]}" "${around[@]}"
run streamline streamline "${healing[@]}"
run replaceme replaceme # also refused for them
wait

# evaluate takes what is unchanged from its file, and compares the models question by question.
python - "$output" <<'PYTHON'
import json
import sys
from pathlib import Path

output = Path(sys.argv[1])
parts = [json.loads(file.read_text()) for file in output.glob("parts/*.json")]
models = {name: found for part in parts for name, found in part["models"].items()}
(output / "evaluation.json").write_text(json.dumps(parts[0] | {"models": models}))
PYTHON
finished=()
for part in "$output"/parts/*.json; do
  name=$(basename "$part" .json)
  [[ $name == dense ]] || finished+=("$output/$name")
done
hf-layerprune evaluate "$model" "${finished[@]}" "${measure[@]}" --json "$output/evaluation.json"
