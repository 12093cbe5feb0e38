"""Models, tokenizers and lineages from a folder or the hub, and models into a folder, checked."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .decoder import find_decoder
from .errors import LayerPruneError
from .lineage import Lineage, get_lineage
from .scoring import undisturbed


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
    get_lineage(_load(AutoConfig, name, "model config", **trust))  # nothing is built of a hostile count
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
    more = [
        key for key in report["unexpected_keys"] for i in entry.findall(key) if int(i) >= len(decoder.layers)
    ]
    if more:
        raise LayerPruneError(
            f"The weights of {name} do not fit its config, which has {len(decoder.layers)} layers: there is "
            f"{sorted(more)[0]}, too."
        )
    return model


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a folder or a hub id.

    Raises:
        LayerPruneError: there is none, or it cannot be reached.
    """
    return _load(AutoTokenizer, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_lineage(folder: str | Path, trust_remote_code: bool = False) -> Lineage:
    """Read the lineage of the model saved in `folder`, from its config alone.

    Raises:
        LayerPruneError: no config there.
    """
    config = _load(AutoConfig, str(folder), "model config", trust_remote_code=trust_remote_code)
    return get_lineage(config)


def save_model(
    model: PreTrainedModel, folder: str | Path, *, verify: bool = True, legacy_rope: bool = False
) -> None:
    """Save `model` as a plain transformers model and check that it is the same when loaded again.

    Args:
        model (`PreTrainedModel`): the model.
        folder (`str` or `Path`): where to.
        verify (`bool`, *optional*, defaults to `True`): load it again, as a second model in memory, and
            compare the logits of a few tokens.
        legacy_rope (`bool`, *optional*, defaults to `False`): see [`saving`].

    Raises:
        LayerPruneError: it cannot be saved, or is another model when loaded. It says where the weights are.
    """
    with saving(model, folder, verify=verify, legacy_rope=legacy_rope):
        model.save_pretrained(folder)


@contextmanager
def saving(model: PreTrainedModel, folder: str | Path, *, verify: bool, legacy_rope: bool) -> Iterator[None]:
    """The context in which something saves `model` in `folder`. If it fails, the weights are put there as
    bare tensors; if it works, what lies there is checked.

    Args:
        verify (`bool`): load the model again and compare the logits of a few tokens.
        legacy_rope (`bool`): write the rotary settings into config.json under their old names as well
            (`rope_theta`, `rope_scaling`), which transformers 4 and converters read.

    Raises:
        LayerPruneError: it cannot be saved, or is another model when loaded. It says where the weights are.
    """
    folder = Path(folder)
    try:
        yield
    except OSError:  # the disk is full or gone, there is no place to put anything
        raise
    except Exception as error:
        rescue = folder / "rescued.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(model, str(rescue))
        raise LayerPruneError(
            f"The model cannot be saved as a plain model: {_one_line(error)} All its weights are safe, as "
            f"they are in memory, in {rescue}."
        ) from error
    if legacy_rope:
        _add_legacy_rope(folder / "config.json")
    if verify:
        _check_reload(model, folder)


def _check_reload(model: PreTrainedModel, folder: Path) -> None:
    advice = (
        f"The weights as they were in memory are safe in {folder}, but do not use them as they are. "
        "Please report this with the model's config."
    )
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    cls: Any = type(model)
    try:
        again, report = cls.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:
        raise LayerPruneError(f"What was saved does not load: {_one_line(error)} {advice}") from error
    wrong = {what: sorted(map(str, names))[:3] for what, names in report.items() if names}
    if wrong:
        raise LayerPruneError(f"What was saved does not fit its config: {wrong}. {advice}")
    vocabulary: Any = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(32, device=model.device).view(2, 16) % vocabulary
    with undisturbed(model):
        # Not through the precision context in which accelerate wraps a model in training.
        live = getattr(model, "_original_forward", model)(input_ids=tokens, use_cache=False).logits
        saved = again.eval().to(model.device)(input_ids=tokens, use_cache=False).logits
    scale = float(live.float().nan_to_num().std())
    tolerance = scale * (1e-3 if model.dtype == torch.float32 else 0.05)
    if not torch.allclose(live, saved, rtol=0, atol=tolerance, equal_nan=True):
        far = float((live - saved).abs().max()) / scale
        raise LayerPruneError(
            f"What was saved is another model when loaded: its logits are off by {far:.2g} of their standard "
            f"deviation. {advice}"
        )


def _add_legacy_rope(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    rope = text.get("rope_parameters") or {}
    if "full_attention" in rope:
        text |= _legacy_rope(rope["full_attention"], text["model_type"])
        if "sliding_attention" in rope:
            text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif "rope_theta" in rope:
        text |= _legacy_rope(rope, text["model_type"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _legacy_rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    names = ("rope_theta", "partial_rotary_factor")
    if model_type.startswith("gpt_neox"):
        names = ("rotary_emb_base", "rotary_pct")
    old = {names[0]: rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        old[names[1]] = rope["partial_rotary_factor"]
    return old if rest.get("rope_type") == "default" else old | {"rope_scaling": rest}


def _load(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise LayerPruneError(f"{name} is not a folder with a model: it has no config.json.")
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:  # a damaged file may end in anything
        raise LayerPruneError(
            f"Cannot load a {what} from {name!r}, neither as a folder nor as a hub id: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
