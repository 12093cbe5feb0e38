"""The callback in a plain Trainer: it removes one layer after another while the model trains on text.

python examples/plain_trainer.py MODEL TEXT.txt OUTPUT_DIR TARGET_LAYERS [MAX_STEPS]
"""

import sys

from transformers import Trainer, TrainingArguments

from hf_layerprune import (
    LayerPruningCallback,
    load_model,
    load_texts,
    load_tokenizer,
    split_sequences,
    token_sequences,
)


name, text, output_dir, target_layers = sys.argv[1:5]
max_steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300

model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
length = min(256, model.config.max_position_embeddings)
blocks = token_sequences(load_texts(text), tokenizer, length)
calibration, heldout, train = split_sequences(blocks, calibration=8, heldout=8)

pruning = LayerPruningCallback(target_layers=int(target_layers), calibration=calibration)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output_dir, max_steps=max_steps, per_device_train_batch_size=4, learning_rate=1e-5
    ),
    train_dataset=train,
    eval_dataset=heldout,
    callbacks=[pruning],
)
pruning.set_trainer(trainer)
trainer.train()
print(trainer.evaluate())
model.save_pretrained(output_dir)
tokenizer.save_pretrained(output_dir)
