"""A Trainer script with three lines changed, so that it removes layers while it trains.

python examples/drop_in.py MODEL TEXT.txt OUTPUT_DIR TARGET_LAYERS [MAX_STEPS]
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

# 1. instead of: from transformers import Trainer, TrainingArguments
from hf_layerprune import DistillationTrainer, DistillationTrainingArguments, LayerPruningCallback


name, text, output_dir, target_layers = sys.argv[1:5]
max_steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300

model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
length = min(256, model.config.max_position_embeddings)
lines = load_dataset("text", data_files=text, split="train").filter(lambda row: row["text"].strip())
lines = lines.map(lambda row: tokenizer(row["text"], truncation=True, max_length=length))
parts = lines.remove_columns("text").train_test_split(test_size=0.1, seed=0)

# 2. instead of: args = TrainingArguments(
args = DistillationTrainingArguments(
    output_dir=output_dir,
    max_steps=max_steps,
    per_device_train_batch_size=4,
    learning_rate=1e-5,
    logging_steps=10,
)

trainer = DistillationTrainer(
    model=model,
    args=args,
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    # 3. new
    callbacks=[
        LayerPruningCallback(target_layers=int(target_layers), calibration=parts["test"].select(range(16)))
    ],
)
trainer.train()
trainer.save_model()
print(f"Saved a model of {model.config.num_hidden_layers} layers in {output_dir}.")
