"""Models, tokenizers, lineages and adapters from a folder or the hub, with errors that say what to do."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file

from .decoder import find_decoder
from .errors import LayerPruneError
from .lineage import Lineage, get_lineage, read_lineage
from .surgery import keep_lineage


PRUNED_BASE = "pruned_base.json"


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or a hub id.

    Args:
        name (`str`): the folder or hub id.
        options: arguments of `from_pretrained`. Code that comes with a model is only run with
            `trust_remote_code=True`.

    Raises:
        LayerPruneError: no model there, it cannot be reached, or its weights do not fit its config.
    """
    trust = {"trust_remote_code": options.get("trust_remote_code", False)}
    get_lineage(_load(AutoConfig, name, "model", **trust))  # nothing is built of a hostile count
    # Tensors of another shape shall be reported, as missing ones are, and not end in a traceback.
    options |= trust | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load(AutoModelForCausalLM, name, "model", **options)
    lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if lacking:
        raise LayerPruneError(
            f"The weights of {name} do not fit its config: {len(lacking)} tensors are missing or of "
            f"another shape, first {lacking[0]}."
        )
    decoder = find_decoder(model)
    entry = re.compile(rf"(?:^|\.){decoder.attribute}\.(\d+)\.")
    # Further layers may predict further tokens (DeepSeek's), which transformers does not load.
    last = len(decoder.layers) + (getattr(decoder.config, "num_nextn_predict_layers", None) or 0)
    more = [key for key in report["unexpected_keys"] for i in entry.findall(key) if int(i) >= last]
    if more:
        raise LayerPruneError(
            f"The weights of {name} do not fit its config, which has {len(decoder.layers)} layers: there is "
            f"{sorted(more)[0]}, too."
        )
    return model


def load_skeleton(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights, on the meta device, from its config in a folder or on the hub.

    Raises:
        LayerPruneError: no config there, or none that a causal language model can be built of.
    """
    config = _load(AutoConfig, name, "model config", trust_remote_code=trust_remote_code)
    get_lineage(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LayerPruneError(
            f"No model can be built from the config of {name!r}: {one_line(error)}"
        ) from error


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a folder or a hub id.

    Raises:
        LayerPruneError: there is none, or it cannot be reached.
    """
    return _load(AutoTokenizer, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_lineage(folder: str | Path, trust_remote_code: bool = False) -> Lineage:
    """Read the lineage of the model saved in `folder`, or of that which its adapters are for.

    Raises:
        LayerPruneError: no config there.
    """
    if (Path(folder) / PRUNED_BASE).is_file():
        return _read_pruned_base(str(folder))[0]
    config = _load(AutoConfig, str(folder), "model config", trust_remote_code=trust_remote_code)
    return get_lineage(config)


def runs_own_code(model: Any) -> bool:
    """Whether `model` was loaded with code of its own, so that its checkpoints need that, too."""
    return type(model.config).__module__.startswith("transformers_modules.")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a [`~transformers.Trainer`] in `output_dir` that was written to its end.

    What the Trainer writes last is its state, so a checkpoint without it, or with half of it, is passed over.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = {path.name.rpartition("-")[2]: path for path in folders if is_whole(path)}
    steps = [step for step in numbered if step.isdecimal()]
    return str(numbered[max(steps, key=int)]) if steps else None


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint of a [`~transformers.Trainer`] was written to its end."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def load_pruned_adapter(name: str, base_model: PreTrainedModel | None = None, **options: Any) -> Any:
    """Load adapters that [`save_adapter`] saved: the base, cut as it was, with the adapters on it.

    Args:
        name (`str`): folder or hub id of the adapters.
        base_model (`PreTrainedModel`, *optional*): the base, cut already; left out, it is loaded and cut.
        options: arguments of [`load_model`], for the base.

    Returns:
        `PeftModel`

    Raises:
        LayerPruneError: no such record there, or `base_model` has other layers than the record says.
    """
    from peft import PeftModel

    lineage, base_name = _read_pruned_base(name)
    if base_model is None:
        base_model = load_model(str(base_name), **options)
        keep_lineage(base_model, lineage)
    if get_lineage(base_model) != lineage:
        raise LayerPruneError(
            f"The adapters are for {lineage} of {base_name}, but base_model has "
            f"{get_lineage(base_model)}: leave it out, or cut it first."
        )
    try:
        return PeftModel.from_pretrained(base_model, name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LayerPruneError(f"Cannot load the adapters in {name}: {one_line(error)}") from error


def _read_pruned_base(name: str) -> tuple[Lineage, str]:
    """What layers the adapters in a folder or on the hub are for, and of which model."""
    try:
        path = cached_file(name, PRUNED_BASE)
        record = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        return read_lineage(record), record["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerPruneError(
            f"{name} has no readable {PRUNED_BASE}, which says what layers the adapters are for: "
            f"{one_line(error)}"
        ) from error


def _load(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    path = Path(name)
    if (path / PRUNED_BASE).is_file():
        raise LayerPruneError(f"{name} holds adapters for a cut model: use load_pruned_adapter({name!r}).")
    if path.exists() and not (path / "config.json").is_file():
        raise LayerPruneError(f"{name} is not a folder with a model: it has no config.json.")
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:  # a damaged file may end in anything
        if "trust_remote_code" in str(error):
            raise LayerPruneError(
                f"{name} comes with code of its own, which is only run if you say trust_remote_code=True "
                "(--trust_remote_code): read it first."
            ) from error
        raise LayerPruneError(
            f"Cannot load a {what} from {name!r}, neither as a folder nor as a hub id: {one_line(error)}"
        ) from error


def one_line(error: Exception) -> str:
    """What an error says, fit to stand in the middle of a sentence."""
    return " ".join(str(error).split())[:300]
