"""Reads the versions, hardware and memory of the process, for records and benchmarks."""

import platform
import resource
import sys
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel


def surroundings(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the package versions and the hardware of this process."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "hf-layerprune")},
        },
        "machine": {
            "device": str(model.device),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpu_threads": torch.get_num_threads(),
        },
    }


def peak_memory_mb() -> int:
    """Returns the peak memory of this process in MB: GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    # Linux counts in kB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
