"""Loads models, tokenizers, processors, lineages and adapters from a folder or the hub."""

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
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..errors import LayerPruneError, one_line
from ..surgery.decoder import check_reads_text, find_decoder
from ..surgery.fresh_model import quiet
from ..surgery.lineage import Lineage, get_lineage, read_lineage
from ..surgery.peft import PRUNED_BASE, keep_base_known
from ..surgery.removal import keep_lineage
from .adapter_folder import adapter_base, load_adapter, merge_exactly


logger = logging.getLogger(__name__)

# Files beside the weights of multimodal models and of sentence-transformers models.
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
    """Loads a model as the class that its config names in `architectures`.

    The model is a causal language model, classifier, encoder, embedding or vision-language model. PEFT
    adapters are merged into their base model.

    Args:
        name (`str`): folder or hub id of the model or of adapters.
        options: arguments of `from_pretrained`. Code in the repository of a model runs only with
            `trust_remote_code=True`.

    Returns:
        `PreTrainedModel`

    Raises:
        LayerPruneError: the model does not exist, cannot be reached or is of an unsupported kind, its weights
            do not fit its config, or adapters cannot be merged exactly.
    """
    if adapter_base(name) is not None:
        return _load_merged(name, options)
    trust = options.get("trust_remote_code", False)
    config, cls = load_class(name, trust, options.get("gguf_file"))
    # With these options, tensors of another shape are reported like missing tensors, without a traceback.
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
    # Layers for multi-token prediction (DeepSeek) follow the decoder layers. transformers does not load them.
    last = len(decoder.layers) + (getattr(decoder.config, "num_nextn_predict_layers", None) or 0)
    more = [key for key in report["unexpected_keys"] for i in entry.findall(key) if int(i) >= last]
    if more:
        raise LayerPruneError(
            f"The weights of {name} do not fit its config, which has {len(decoder.layers)} layers: there is "
            f"{sorted(more)[0]}, too."
        )
    return model


def _load_merged(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Returns the base of the adapters in `name` with the adapters merged into its weights."""
    load_class(name, options.get("trust_remote_code", False))  # for its checks, before weights are loaded
    quantization: Any = options.get("quantization_config")
    if quantization is not None and not getattr(quantization, "dequantize", False):
        raise LayerPruneError(
            f"{name} holds adapters, which cannot be merged exactly into a base model that is quantised on "
            "loading. Load it without load_in_4bit and load_in_8bit, or save the merged model first."
        )
    if (Path(name) / PRUNED_BASE).is_file():
        adapted = load_pruned_adapter(name, **options)
    else:
        adapted = load_adapter(load_model(str(adapter_base(name)), **options), name)
    logger.info("%s holds adapters: they are merged into %s.", name, adapter_base(name))
    merged = merge_exactly(adapted, name)
    merged.config.name_or_path = merged.name_or_path = name
    return merged


def stored_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype:
    """Returns the dtype in which a model is stored. It is the dtype in the config, else that of the weights.

    Raises:
        LayerPruneError: the model does not exist or cannot be reached.
    """
    config, cls = load_class(name, trust_remote_code)
    name = adapter_base(name) or name
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    trust = {"trust_remote_code": trust_remote_code}
    with quiet():  # transformers then reads the dtype from the weights
        return _load(cls, name, "model", dtype="auto", device_map="meta", **trust).dtype


def load_class(
    name: str, trust_remote_code: bool = False, gguf_file: str | None = None
) -> tuple[PreTrainedConfig, Any]:
    """Returns the config of a model and the class that its `architectures` name, without loading weights.

    Args:
        name (`str`): folder or hub id of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code of the model may run.
        gguf_file (`str`, *optional*): the GGUF file in `name` that holds the model.

    Returns:
        `tuple[PreTrainedConfig, type]`: the config and the class. The class is an auto class if the model has
        its own code, or names no class of transformers.

    Raises:
        LayerPruneError: there is no config, or the kind of the model is not supported.
    """
    base = adapter_base(name)
    if base is not None:
        return _load_class_of_base(name, base, trust_remote_code)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    config = _load(AutoConfig, name, "model", trust_remote_code=trust_remote_code, **options)
    names = getattr(config, "architectures", None)
    named = names[0] if isinstance(names, (list, tuple)) and names and isinstance(names[0], str) else ""
    cls: Any = getattr(transformers, named, None) if named else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and _is_for(cls, config)):
        cls = AutoModelForCausalLM
    if (
        trust_remote_code
    ):  # The model's own code has precedence over a class of transformers of the same name.
        own = getattr(config, "auto_map", None) or {}
        autos = [auto for auto, code in own.items() if isinstance(code, str) and code.split(".")[-1] == named]
        cls = next((getattr(transformers, auto) for auto in autos if hasattr(transformers, auto)), cls)
    check_reads_text(cls, config, name)
    get_lineage(config)  # refuses an absurd number of layers before the model is built
    return config, cls


def _load_class_of_base(name: str, base: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, Any]:
    """Returns the config and the class of the base of the adapters in `name`. The config counts only the kept
    layers."""
    try:
        config, cls = load_class(base, trust_remote_code)
    except LayerPruneError as error:
        raise LayerPruneError(
            f"{name} holds adapters for {base}. {error} If the base model is somewhere else, set "
            f"base_model_name_or_path in {ADAPTER_CONFIG_NAME} to its folder or hub id."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise LayerPruneError(
            f"{name} holds adapters for {base}, which is quantised, so that they cannot be merged exactly. "
            f"Set base_model_name_or_path in {ADAPTER_CONFIG_NAME} to the model before quantisation."
        )
    if (Path(name) / PRUNED_BASE).is_file():
        pruned = load_meta_model(base, trust_remote_code)
        keep_lineage(pruned, _read_pruned_base(name)[0])
        config = pruned.config
    return config, cls


def _is_for(cls: Any, config: PreTrainedConfig) -> bool:
    """Returns whether a class of models accepts this config."""
    return isinstance(cls.config_class, type) and isinstance(config, cls.config_class)


def load_meta_model(
    name: str, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedModel:
    """Returns a model without weights, built from its config on the meta device.

    Raises:
        LayerPruneError: there is no config, or no supported model can be built from it.
    """
    config, cls = load_class(name, trust_remote_code, gguf_file)
    try:
        with torch.device("meta"):
            if issubclass(cls, PreTrainedModel):
                return cls(config)
            return cls.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LayerPruneError(
            f"No model can be built from the config of {name!r}: {one_line(error)}"
        ) from error


def load_tokenizer(
    name: str, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model from a folder or the hub, or from a GGUF file there.

    Raises:
        LayerPruneError: the tokenizer does not exist or cannot be reached.
    """
    base = adapter_base(name)
    if base is not None and _companion(name, TOKENIZER_CONFIG_FILE) is None:
        return load_tokenizer(base, trust_remote_code)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    return _load(AutoTokenizer, name, "tokenizer", trust_remote_code=trust_remote_code, **options)


def load_processor(name: str, trust_remote_code: bool = False) -> Any:
    """Loads the processor of a vision-language model. Returns None if the model has no usable processor."""
    name = adapter_base(name) or name
    if all(_companion(name, file) is None for file in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME)):
        return None
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file or a missing package can raise any error
        logger.warning("Pictures cannot be read: the processor of %s fails. %s", name, one_line(error))
        return None
    if getattr(processor, "image_processor", None) is None:  # of an unknown class, or for sound alone
        logger.warning("Pictures cannot be read: %s has no image processor.", name)
        return None
    return processor


def copy_companions(name: str, folder: str | Path) -> list[str]:
    """Copies the files of a model's processor (images, video, chat template) and of sentence-transformers.

    Args:
        name (`str`): folder or hub id of the model.
        folder (`str` or `Path`): the folder to copy to. Existing files are not replaced.

    Returns:
        `list[str]`: the names of the copied files.
    """
    name = adapter_base(name) or name
    modules = _companion(name, "modules.json")
    parts = [] if modules is None else json.loads(modules.read_text(encoding="utf-8"))
    # Other modules, such as the pooling of an embedding model, have their own folders.
    inner = [
        f"{part['path']}/{file}"
        for part in parts
        if re.fullmatch(r"\w+", part.get("path", ""))  # stays in the folder: the file may be malicious
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
    """Returns the path of a file of a model, None if the model has no such file."""
    if not name:  # a model made in memory
        return None
    try:
        return Path(str(cached_file(name, file)))
    except OSError:
        return None


def load_lineage(folder: str | Path, trust_remote_code: bool = False) -> Lineage:
    """Returns the lineage of the model saved in `folder`, or of the base of the adapters there.

    Raises:
        LayerPruneError: there is no config.
    """
    if (Path(folder) / PRUNED_BASE).is_file():
        return _read_pruned_base(str(folder))[0]
    config = _load(AutoConfig, str(folder), "model config", trust_remote_code=trust_remote_code)
    return get_lineage(config)


def runs_own_code(model: Any) -> bool:
    """Returns whether `model` was loaded with its own code. Its checkpoints then need this code too."""
    return type(model.config).__module__.startswith("transformers_modules.")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Returns the newest complete checkpoint of a [`~transformers.Trainer`] in `output_dir`, or None.

    The Trainer writes its state last. A checkpoint without a readable state is incomplete.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = {path.name.rpartition("-")[2]: path for path in folders if is_whole(path)}
    steps = [step for step in numbered if step.isdecimal()]
    return str(numbered[max(steps, key=int)]) if steps else None


def is_whole(checkpoint: str | Path) -> bool:
    """Returns whether a checkpoint of a [`~transformers.Trainer`] is complete."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def load_pruned_adapter(name: str, base_model: PreTrainedModel | None = None, **options: Any) -> Any:
    """Loads the adapters that [`save_adapter`] saved, onto their pruned base.

    Args:
        name (`str`): folder or hub id of the adapters.
        base_model (`PreTrainedModel`, *optional*): the pruned base. Default: the base in `pruned_base.json`
            is loaded and pruned.
        options: arguments of [`load_model`], for the base.

    Returns:
        `PeftModel`

    Raises:
        LayerPruneError: there is no `pruned_base.json`, or `base_model` does not have the layers that it
            lists.
    """
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
    model = load_adapter(base_model, name)
    keep_base_known(model)
    return model


def _load_base(name: str, base_name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Returns the base of the adapters in `name`, as the class that they were trained on.

    The base of a classifier is often stored as a language model. The adapters then hold the classifier head.
    """
    trust = options.get("trust_remote_code", False)
    record = json.loads(Path(str(cached_file(name, PRUNED_BASE))).read_text(encoding="utf-8"))
    cls: Any = getattr(transformers, str(record.get("class")), None)
    stored = load_class(base_name, trust)[1]
    if cls is None or not issubclass(stored, PreTrainedModel) or cls is stored:
        return load_model(base_name, **options)
    with_head = {"num_labels": record["num_labels"]} if "num_labels" in record else {}
    return _load(cls, base_name, "model", **options | with_head)


def _read_pruned_base(name: str) -> tuple[Lineage, str]:
    """Returns the lineage and the name of the base of adapters."""
    try:
        path = cached_file(name, PRUNED_BASE)
        record = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        return read_lineage(record), record["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerPruneError(
            f"{name} has no readable {PRUNED_BASE}, which names the layers of the base: {one_line(error)}"
        ) from error


def _load(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    """Returns the object that `from_pretrained` of a class loads.

    Raises:
        LayerPruneError: loading fails. The error has the reason and what to do.
    """
    path = Path(name)
    gguf_file = options.get("gguf_file")
    if path.exists() and gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise LayerPruneError(
                f"gguf_file is {gguf_file}, but {name} has no such file. Give the name of a file there."
            )
    elif path.exists() and not any((path / file).is_file() for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise LayerPruneError(f"{name} is not a folder with a model: it has no config.json.")
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:  # a damaged file can raise any error
        if "trust_remote_code" in str(error):
            raise LayerPruneError(
                f"{name} comes with code of its own, which is only run if you say trust_remote_code=True "
                "(--trust_remote_code): read it first."
            ) from error
        raise LayerPruneError(
            f"Cannot load a {what} from {name!r}, neither as a folder nor as a hub id: {one_line(error)}"
        ) from error
