#!/usr/bin/env bash
# The recipes side by side on one model, with the same text, tokens and schedule, and their evaluation.
#
#   examples/benchmarks/compare_recipes.sh MODEL TEXT OUTPUT LAYERS EVALUATION_TEXT [TASK=FILE...]
#
# TEXT is from text_mix.py. STEPS (245) are of 4 x 256 tokens. JOBS (1) runs train at once: a large GPU has room for
# all. A finished run in OUTPUT is left alone. OUTPUT/evaluation.json holds the result.
set -euo pipefail

model=$1 text=$2 output=$3 layers=$4 evaluation=$5
shift 5
steps=${STEPS:-245} jobs=${JOBS:-1}
depth=$(python -c "import sys; from transformers import AutoConfig as C; print(C.from_pretrained(sys.argv[1]).num_hidden_layers)" "$model")
mkdir -p "$output"

run() { # NAME RECIPE FLAGS...
  local name=$1 recipe=$2
  shift 2
  [[ -f $output/$name/config.json ]] && return 0
  while (( $(jobs -rp | wc -l) >= jobs )); do wait -n; done
  hf-layerprune run "$recipe" --model "$model" --target_layers "$layers" --data "$text" --output_dir "$output/$name" \
    --calibration_sequences 128 --heldout_sequences 32 --sequence_length 256 --save_strategy no --report_to none \
    --disable_tqdm True "$@" > "$output/$name.log" 2>&1 &
}

healing=(--max_steps "$steps" --per_device_train_batch_size 4 --learning_rate 3e-4 --lr_scheduler_type cosine
  --lr_scheduler_kwargs '{}' --warmup_steps 0.05 --weight_decay 0 --bf16 True --logging_steps 7)
phases=(--steps_per_phase $((steps / (depth - layers))) --calibration_sequences 32)
around=(--reconstruction_layers 3 --reconstruction_learning_rate 2e-3)

run linear-map default "${healing[@]}" # refused for models that normalise the feed-forward output
run linear-map-reconstruction default "${healing[@]}" "${around[@]}"
run block default "${healing[@]}" --replacement none
run block-reconstruction default "${healing[@]}" --replacement none "${around[@]}"
run block-raced default "${healing[@]}" --replacement none "${around[@]}" --block_candidates 3
run shortgpt shortgpt "${healing[@]}"
run iterative iterative-small "${healing[@]}" "${phases[@]}"
run iterative-reconstruction iterative-small "${healing[@]}" "${phases[@]}" "${around[@]}"
run streamline streamline "${healing[@]}"
run replaceme replaceme
wait

finished=()
for config in "$output"/*/config.json; do finished+=("$(dirname "$config")"); done
hf-layerprune evaluate "$model" "${finished[@]}" --data "$evaluation" --max_sequences 64 --tasks "$@" --limit 2000 \
  --dtype bfloat16 --json "$output/evaluation.json"
