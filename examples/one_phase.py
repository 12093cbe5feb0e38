"""Trains one phase of a run. DeepSpeed and FSDP1 must start again in each phase:

hf-layerprune phases NAME --data OTHER.txt --target_layers 24 --output_dir healed -- \\
    accelerate launch --config_file examples/deepspeed.yaml \\
    examples/one_phase.py {model} NAME TEXT.txt {output_dir} 300

`phases` scores layers and evaluates the pruned model on OTHER.txt. This script trains on TEXT.txt.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    last_checkpoint,
    load_texts,
    token_sequences,
)


cut, name, text, output_dir = sys.argv[1:5]
max_steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300

# Before the arguments are made: after that, ZeRO-3 would take the teacher apart, too.
model = AutoModelForCausalLM.from_pretrained(cut, dtype="float32")
teacher = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
train = token_sequences(load_texts(text), tokenizer, min(256, model.config.max_position_embeddings))

trainer = DistillationTrainer(
    model,
    DistillationTrainingArguments(
        output_dir=output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        logging_steps=10,
    ),
    teacher_model=teacher,
    train_dataset=train,
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
trainer.save_model()
trainer.accelerator.end_training()
