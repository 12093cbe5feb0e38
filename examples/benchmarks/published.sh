#!/usr/bin/env bash
# Every method at 23 of the 30 layers of SmolLM2-135M, some at 25 and 27 too: the same text, tokens and schedule, where
# not said otherwise.
#
#   examples/benchmarks/published.sh MODEL TEXT OUTPUT [NAME...]
#
# TEXT is from text_mix.py. Each NAME is a folder in OUTPUT; one that is finished is left alone.
set -euo pipefail

model=$1 text=$2 output=$3
shift 3
wanted=" ${*:-} "

# 245 steps of 4 x 256 tokens: 250,880.
healing=(--max_steps 245 --per_device_train_batch_size 4 --learning_rate 3e-4 --lr_scheduler_type cosine
  --lr_scheduler_kwargs '{}' --warmup_steps 0.05 --weight_decay 0 --bf16 True --logging_steps 7)
common=(--sequence_length 256 --heldout_sequences 32 --save_strategy no --report_to none --disable_tqdm True)

method() { # NAME KEEP RECIPE FLAGS...
  local name=$1 keep=$2 recipe=$3
  shift 3
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  [[ -f $output/$name/config.json ]] && return 0
  hf-layerprune run "$recipe" --model "$model" --target_layers "$keep" --data "$text" --output_dir "$output/$name" \
    --calibration_sequences 128 "${common[@]}" "$@"
}

# The recipe as it is, in float32, and as it was before passages were repeated.
alone=(--max_steps 245 --per_device_train_batch_size 4 --bf16 False --logging_steps 7)
method default-23 23 default "${alone[@]}"
method without-repeats-23 23 default "${alone[@]}" --repeat_share 0
method without-repeats-27 27 default "${alone[@]}" --repeat_share 0

map=(--replacement linear --reconstruction_layers 0 --repeat_share 0)
around=(--reconstruction_layers 3 --reconstruction_learning_rate 2e-3 --repeat_share 0)
method reconstruction-23 23 default "${healing[@]}" "${around[@]}"
method reconstruction-25 25 default "${healing[@]}" "${around[@]}"
method reconstruction-without-map-23 23 default "${healing[@]}" "${around[@]}" --replacement none
method iterative-reconstruction-23 23 iterative-small "${healing[@]}" "${around[@]}" --steps_per_phase 35 \
  --calibration_sequences 32
method linear-map-23 23 default "${healing[@]}" "${map[@]}"
method iterative-23 23 iterative-small "${healing[@]}" --steps_per_phase 35 --calibration_sequences 32
method iterative-23-one-schedule 23 iterative-small "${healing[@]}" --steps_per_phase 35 --calibration_sequences 32 \
  --restart_learning_rate False
method iterative-23-early 23 iterative-small "${healing[@]}" --steps_per_phase 8 --calibration_sequences 32 \
  --restart_learning_rate False # what is left over heals the last phase
method shortgpt-23 23 shortgpt "${healing[@]}"
method sleb-23 23 sleb "${healing[@]}" --racing 0.95 --calibration_sequences 32
method streamline-23 23 streamline "${healing[@]}"
method layerchop-23 23 layerchop "${healing[@]}"
method deepest-23 23 deepest "${healing[@]}"
method replaceme-23 23 replaceme
method linear-map-27 27 default "${healing[@]}" "${map[@]}"
method linear-map-25 25 default "${healing[@]}" "${map[@]}"

# The linear map and the runs next to it, with the text in another order.
method linear-map-23-seed-7 23 default "${healing[@]}" "${map[@]}" --seed 7
method sleb-23-seed-7 23 sleb "${healing[@]}" --racing 0.95 --calibration_sequences 32 --seed 7
method shortgpt-23-seed-7 23 shortgpt "${healing[@]}" --seed 7

# Longer, in as many sittings as it takes.
long=$output/linear-map-23-long
resume=()
if compgen -G "$long/checkpoint-*" > /dev/null; then resume=(--resume); fi
method linear-map-23-long 23 default "${healing[@]}" "${map[@]}" --max_steps 1000 --save_strategy steps --save_steps 50 \
  --save_total_limit 1 "${resume[@]}"
