"""Fine-tunes a chat model with trl. Nothing here knows about layer pruning."""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser


@dataclass
class ScriptArguments:
    dataset_name: str = field(metadata={"help": "JSON lines with messages, or prompt and completion."})
    test_size: int = field(default=8, metadata={"help": "Rows to evaluate on."})


def main(script_args, training_args, model_args):
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="float32")
    dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    dataset = dataset.train_test_split(test_size=script_args.test_size, seed=training_args.seed)

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
