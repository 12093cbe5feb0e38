"""Models, tokenizers, lineages and adapters from a folder or the hub, with errors that say what to do."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    FEATURE_EXTRACTOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

from ..errors import LayerPruneError, one_line
from ..surgery.decoder import check_reads_text, find_decoder
from ..surgery.fresh_model import quiet
from ..surgery.lineage import Lineage, get_lineage, read_lineage
from ..surgery.peft import PRUNED_BASE, keep_base_known
from ..surgery.removal import keep_lineage


logger = logging.getLogger(__name__)

# What lies beside the weights of models that read more than text, and of sentence-transformers' models.
COMPANIONS = (
    FEATURE_EXTRACTOR_NAME,
    VIDEO_PROCESSOR_NAME,
    PROCESSOR_NAME,
    CHAT_TEMPLATE_FILE,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """Load a model from a folder or a hub id, as the class that its config names in `architectures`: a causal
    language model, classifier, encoder, embedding or vision-language model.

    Args:
        name (`str`): the folder or hub id.
        options: arguments of `from_pretrained`. Code that comes with a model is only run with
            `trust_remote_code=True`.

    Raises:
        LayerPruneError: no model there, it cannot be reached, it is of a kind that is not supported, or its
            weights do not fit its config.
    """
    trust = options.get("trust_remote_code", False)
    config, cls = load_class(name, trust)
    # Tensors of another shape shall be reported, as missing ones are, and not end in a traceback.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if not issubclass(cls, PreTrainedModel):
        options["trust_remote_code"] = trust
    else:
        options.pop("trust_remote_code", None)
    model, report = _load(cls, name, "model", **options)
    named = getattr(config, "architectures", None) or []
    if named and type(model).__name__ not in named:
        logger.warning(
            "The config of %s names the class %s, but the model is loaded and saved as %s: transformers has "
            "no other class for it. Check that its outputs are right.",
            name,
            named[0],
            type(model).__name__,
        )
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


def stored_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype:
    """Returns the dtype in which a model is stored: that of its config, else of its weights.

    Raises:
        LayerPruneError: no model there, or it cannot be reached.
    """
    config, cls = load_class(name, trust_remote_code)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    trust = {"trust_remote_code": trust_remote_code}
    with quiet():  # transformers then looks at the weights
        return _load(cls, name, "model", dtype="auto", device_map="meta", **trust).dtype


def load_class(name: str, trust_remote_code: bool = False) -> tuple[PreTrainedConfig, Any]:
    """Read the config of a model in a folder or on the hub, and find the class that its `architectures` name,
    without loading weights.

    Returns:
        `tuple[PreTrainedConfig, type]`: the config and the class. It is an auto class where the model comes
            with code of its own or names no class of transformers.

    Raises:
        LayerPruneError: no config there, or the model is of a kind that is not supported.
    """
    config = _load(AutoConfig, name, "model", trust_remote_code=trust_remote_code)
    names = getattr(config, "architectures", None)
    named = names[0] if isinstance(names, (list, tuple)) and names and isinstance(names[0], str) else ""
    cls: Any = getattr(transformers, named, None) if named else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and _is_for(cls, config)):
        cls = AutoModelForCausalLM
    if trust_remote_code:  # Code of its own goes before the class of transformers that has its name.
        own = getattr(config, "auto_map", None) or {}
        autos = [auto for auto, code in own.items() if isinstance(code, str) and code.split(".")[-1] == named]
        cls = next((getattr(transformers, auto) for auto in autos if hasattr(transformers, auto)), cls)
    check_reads_text(cls, config, name)
    get_lineage(config)  # nothing is built of a hostile count
    return config, cls


def _is_for(cls: Any, config: PreTrainedConfig) -> bool:
    """Whether a class of models is built from configs such as this one."""
    return isinstance(cls.config_class, type) and isinstance(config, cls.config_class)


def load_meta_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights, on the meta device, from its config in a folder or on the hub.

    Raises:
        LayerPruneError: no config there, or none that a supported model can be built of.
    """
    config, cls = load_class(name, trust_remote_code)
    try:
        with torch.device("meta"):
            if issubclass(cls, PreTrainedModel):
                return cls(config)
            return cls.from_config(config, trust_remote_code=trust_remote_code)
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


def copy_companions(name: str, folder: str | Path) -> list[str]:
    """Copy the files of a model's processor (pictures, video, chat template) and of sentence-transformers.

    Args:
        name (`str`): folder or hub id of the model.
        folder (`str` or `Path`): where to. Files that are there stay as they are.

    Returns:
        `list[str]`: the names of the files that were copied.
    """
    modules = _companion(name, "modules.json")
    parts = [] if modules is None else json.loads(modules.read_text(encoding="utf-8"))
    # The other modules stand in folders of their own, such as the pooling of an embedding model.
    inner = [
        f"{part['path']}/{file}"
        for part in parts
        if re.fullmatch(r"\w+", part.get("path", ""))  # and nowhere else: the file may be somebody else's
        for file in _OF_A_MODULE
    ]
    copied = []
    for file in (*COMPANIONS, *inner):
        source, target = _companion(name, file), Path(folder) / file
        if source is not None and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            copied.append(file)
    return copied


_OF_A_MODULE = ("config.json", "model.safetensors", "pytorch_model.bin")


def _companion(name: str, file: str) -> Path | None:
    """Where a file of a model lies; None if it has none."""
    try:
        return Path(str(cached_file(name, file)))
    except OSError:
        return None


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
        if not base_name:
            raise LayerPruneError(
                f"{Path(name) / PRUNED_BASE} does not say where the base model is from. Pass base_model=."
            )
        base_model = _load_base(name, str(base_name), options)
        keep_lineage(base_model, lineage)
    if get_lineage(base_model) != lineage:
        raise LayerPruneError(
            f"The adapters are for {lineage} of {base_name}, but base_model has "
            f"{get_lineage(base_model)}: leave it out, or cut it first."
        )
    try:
        model = PeftModel.from_pretrained(base_model, name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LayerPruneError(f"Cannot load the adapters in {name}: {one_line(error)}") from error
    keep_base_known(model)
    return model


def _load_base(name: str, base_name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The base of the adapters in `name`, as the class that they were trained on. A classifier's base is
    often stored as a language model, and the adapters bring the head."""
    trust = options.get("trust_remote_code", False)
    record = json.loads(Path(str(cached_file(name, PRUNED_BASE))).read_text(encoding="utf-8"))
    cls: Any = getattr(transformers, str(record.get("class")), None)
    stored = load_class(base_name, trust)[1]
    if cls is None or not issubclass(stored, PreTrainedModel) or cls is stored:
        return load_model(base_name, **options)
    with_head = {"num_labels": record["num_labels"]} if "num_labels" in record else {}
    return _load(cls, base_name, "model", **options | with_head)


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
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise LayerPruneError(
            f"{name} holds adapters of PEFT and no model: merge them into their base (merge_and_unload), "
            "save that with save_pretrained, and give its folder."
        )
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
