"""Models, tokenizers and lineages from a folder or the hub, with errors that say what to do."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import LayerPruneError
from .lineage import Lineage, get_lineage


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or a hub id.

    Raises:
        LayerPruneError: no model there, it cannot be reached, or its weights do not fit its config.
    """
    # Tensors of another shape shall be reported, as missing ones are, and not end in a traceback.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load(AutoModelForCausalLM, name, "model", **options)
    lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if lacking:
        raise LayerPruneError(
            f"The weights of {name} do not fit its config: {len(lacking)} tensors are missing or of "
            f"another shape, first {lacking[0]}."
        )
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a folder or a hub id.

    Raises:
        LayerPruneError: there is none, or it cannot be reached.
    """
    return _load(AutoTokenizer, name, "tokenizer")


def load_lineage(folder: str | Path) -> Lineage:
    """Read the lineage of the model saved in `folder`, from its config alone.

    Raises:
        LayerPruneError: no config there.
    """
    return get_lineage(_load(AutoConfig, str(folder), "model config"))


def _load(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise LayerPruneError(f"{name} is not a folder with a model: it has no config.json.")
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LayerPruneError(
            f"Cannot load a {what} from {name!r}, neither as a folder nor as a hub id: {reason}"
        ) from error
