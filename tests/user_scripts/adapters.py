"""Trains LoRA adapters of PEFT in a Trainer. Nothing here knows about layer pruning."""

import sys

from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


name, text, output_dir = sys.argv[1:4]

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
peft_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()


def tokenize(examples):
    return tokenizer(examples["text"], truncation=True, max_length=32)


dataset = load_dataset("text", data_files=text, split="train")
dataset = dataset.map(tokenize, batched=True, remove_columns=["text"])
dataset = dataset.train_test_split(test_size=0.1, seed=0)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output_dir,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
print(trainer.evaluate())
model.save_pretrained(f"{output_dir}/adapter")
tokenizer.save_pretrained(f"{output_dir}/adapter")
