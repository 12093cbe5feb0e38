"""Which loss heals SmolLM2-135M best, on the same steps: KL alone, with hidden states, the paper's mix?

    python examples/benchmarks/losses.py TRAIN.jsonl HELDOUT.jsonl [STEPS]

Three layers go at once; each loss then trains a copy on the same blocks in the same order.
"""

import copy
import sys
from tempfile import TemporaryDirectory

import torch
from transformers.utils.logging import disable_progress_bar

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    evaluate_text,
    remove_layers,
)
from hf_layerprune.data import load_texts, make_batches, token_blocks
from hf_layerprune.quickstart import load_embedded_model


LOSSES = {
    "KL": {},
    "KL + 0.003 hidden": {"hidden_weight": 0.003},
    "KL + 0.03 hidden": {"hidden_weight": 0.03},
    "paper": {"loss_preset": "paper"},
}

train_file, heldout_file = sys.argv[1:3]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 20

disable_progress_bar()
dense, tokenizer = load_embedded_model()
train = token_blocks(load_texts(train_file), tokenizer, 256, limit=600)
heldout = make_batches(token_blocks(load_texts(heldout_file), tokenizer, 256, limit=20), 2)
teacher = copy.deepcopy(dense).to(torch.bfloat16)
cut = copy.deepcopy(dense)
remove_layers(cut, [5, 14, 17])
print(f"held-out loss: uncut {evaluate_text(dense, heldout)['loss']:.3f}", flush=True)
print(f"held-out loss: cut {evaluate_text(cut, heldout)['loss']:.3f}", flush=True)

for name, settings in LOSSES.items():
    student = copy.deepcopy(cut)
    with TemporaryDirectory() as folder:
        args = DistillationTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            seed=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            save_strategy="no",
            report_to="none",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            **settings,
        )
        DistillationTrainer(student, args, teacher_model=teacher, train_dataset=train).train()
    loss = evaluate_text(student, heldout)["loss"]
    print(f"held-out loss: {name}, {steps * 1024} tokens {loss:.3f}", flush=True)
