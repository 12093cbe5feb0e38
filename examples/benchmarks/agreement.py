"""Do the tasks built in say what lm-eval says? Each choice of the first questions of each task, both ways.

python examples/benchmarks/agreement.py MODEL LIMIT hellaswag=rows.jsonl piqa=rows.jsonl ...
"""

import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_layerprune import TASKS, MultipleChoice, lm_eval_samples, load_task


def main(folder: str, limit: int, tasks: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = lm_eval_samples(model, tokenizer, tasks, limit)
    for task in tasks:
        name = task.partition("=")[0]
        questions = load_task(task, limit)
        metric = "acc_norm" if TASKS[name].normalize else "acc"
        answers = MultipleChoice(questions, tokenizer, normalize=TASKS[name].normalize).read(model)
        differences, others = [], 0
        for question, answer, sample in zip(questions, answers, theirs[name], strict=True):
            others += answer.right != bool(sample[metric])
            likelihoods = [response[0][0] for response in sample["resps"]]
            for choice, perplexity, expected in zip(
                question.choices, answer.perplexities, likelihoods, strict=True
            ):
                context, text = (
                    tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in (question.context.rstrip(), question.context + choice)
                )
                found = -math.log(perplexity) * (len(text) - len(context))
                differences.append(abs(found - expected))
        print(
            f"{name:15s} {len(questions)} questions, {len(differences)} choices: largest difference of a "
            f"log-likelihood {max(differences):.1e}, answers that differ {others}"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
