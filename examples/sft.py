"""Removes layers while the SFTTrainer of trl fine-tunes a model: one callback is added.

python examples/sft.py MODEL TEXT.txt OUTPUT_DIR TARGET_LAYERS [MAX_STEPS]
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_layerprune import LayerPruningCallback, last_checkpoint


name, text, output_dir, target_layers = sys.argv[1:5]
max_steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300

checkpoint = last_checkpoint(output_dir)  # of a run that was stopped: it goes on with the layers left there
model = AutoModelForCausalLM.from_pretrained(checkpoint or name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)
lines = load_dataset("text", data_files=text, split="train").filter(lambda row: row["text"].strip())
parts = lines.train_test_split(test_size=0.1, seed=0)

trainer = SFTTrainer(
    model,
    SFTConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        max_length=min(256, model.config.max_position_embeddings),
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        logging_steps=10,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    processing_class=tokenizer,
)
# SFTTrainer has made its data sets ready by now, so score on what it would evaluate.
calibration = trainer.eval_dataset.select(range(16))
pruning = LayerPruningCallback(target_layers=int(target_layers), calibration=calibration)
trainer.add_callback(pruning)
pruning.set_trainer(trainer)
trainer.train(resume_from_checkpoint=checkpoint)
trainer.save_model()
print(f"Saved a model of {model.config.num_hidden_layers} layers in {output_dir}.")
