"""Removes layers while PEFT adapters are trained. The teacher shares the weights of the student.

python examples/lora.py MODEL TEXT.txt OUTPUT_DIR TARGET_LAYERS [MAX_STEPS]
"""

import sys

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruningCallback,
    load_texts,
    split_sequences,
    token_sequences,
)


name, text, output_dir, target_layers = sys.argv[1:5]
max_steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300

model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
blocks = token_sequences(load_texts(text), tokenizer, min(256, model.config.max_position_embeddings))
calibration, heldout, train = split_sequences(blocks, 8, 8)

trainer = DistillationTrainer(
    model,
    DistillationTrainingArguments(
        output_dir=output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=10,
        export="merged",  # or "adapter": a few MB, for load_pruned_adapter
    ),
    train_dataset=train,
    eval_dataset=heldout,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[LayerPruningCallback(target_layers=int(target_layers), calibration=calibration)],
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
