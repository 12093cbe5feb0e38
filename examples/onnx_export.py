"""Exports a pruned model to ONNX with the exporter of transformers, and compares the logits of onnxruntime.

    python examples/onnx_export.py MODEL FOLDER

Needs `pip install onnx onnxscript onnxruntime`.
"""

import sys
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter


def main(model_name: str, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    model.config.use_cache = False
    # Two rows, so that the number of rows stays free in the graph.
    ids = torch.arange(2 * 8).reshape(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).save_pretrained(folder)

    other = torch.arange(3 * 5).reshape(3, 5)  # of another shape than the graph was made with
    feeds = {"input_ids": other, "attention_mask": torch.ones_like(other)}
    with torch.no_grad():
        expected = model(**feeds).logits
    session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"))
    found = session.run(["logits"], {name: value.numpy() for name, value in feeds.items()})[0]
    difference = (torch.from_numpy(found) - expected).abs().max().item()
    scale = expected.abs().max().item()
    print(f"{model.config.num_hidden_layers} layers; logits of up to {scale:.1f} differ by {difference:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
