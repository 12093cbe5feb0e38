"""Every causal language model type of the installed transformers: cut exactly, or refused and left alone."""

import copy
import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, remove_layers
from hf_layerprune.surgery.decoder import find_decoder

from ..tiny_models import TYPES, VARIANTS, tiny_model


# Why no tiny model can be built of these, or run on text alone.
NOT_BUILT = {
    "blt": "four transformers over bytes and patches",
    "dots3_note": "its vision part does not become small",
    "gemma3n": "its vision part needs timm",
    "gemma4_assistant": "a draft model that reads another's keys and values",
    "gemma4_unified_assistant": "a draft model that reads another's keys and values",
    "musicgen": "its text and audio parts come from other libraries' checkpoints",
    "musicgen_melody": "its text and audio parts come from other libraries' checkpoints",
}
# Their layers hand on more than the hidden state, so that a layer passed over by a hook would still speak.
STATEFUL = {"hy_v4", "inkling2_text", "inkling2_loop_text", "reformer", "zaya"}
# Layers that do nothing with text alone: they look at the picture.
IDLE = {"mllama": [2, 5]}

SETS = {"middle": [3], "two": [1, 4]}
ALL_SETS = SETS | {
    "first": [0],
    "last": [6],
    "block": [2, 3, 4],
    "front": [0, 1, 2],
    **{f"layer {layer}": [layer] for layer in (1, 2, 4, 5)},
}
TOLERANCE = 1e-4  # of the logits' standard deviation; another layer, mask or window is 0.01 and more

INPUT_IDS = torch.randint(4, 256, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS, use_cache=False).logits


def skipping(model, layers):
    """The reference: the uncut model with these layers passed over."""
    decoder = find_decoder(model)
    if model.config.get_text_config(decoder=True).model_type in STATEFUL:
        bare = copy.deepcopy(model)
        stack = find_decoder(bare).layers
        for layer in sorted(layers, reverse=True):
            del stack[layer]
        return logits(bare)

    def bypass(module, args, kwargs, output):
        state = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, (tuple, list)):
            return type(output)([state, *output[1:]])
        return state

    handles = [decoder.layers[i].register_forward_hook(bypass, with_kwargs=True) for i in layers]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def cached_logits(model):
    """The same logits, eight tokens at once and the others one by one from the cache; None without one."""
    with torch.no_grad():
        output = model(input_ids=INPUT_IDS[:, :8], use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return None
        found = [output.logits]
        for end in range(9, 13):
            mask = torch.ones(2, end, dtype=torch.long)
            inputs = {"input_ids": INPUT_IDS[:, end - 1 : end], "attention_mask": mask}
            found.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def reloaded(model, folder):
    model.save_pretrained(folder)
    loader = AutoModelForCausalLM
    if type(model).__name__ in ("Emu3ForCausalLM", "MllamaForCausalLM"):  # the text part of a larger model
        loader = type(model)
    again, report = loader.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    return again.eval()


class Checker:
    """One untouched model and what holds of it, so that a cut one is blamed for nothing that is not its."""

    def __init__(self, name, folder):
        self.name = name
        self.model = tiny_model(name)
        self.folder = folder
        self.logits = logits(self.model)
        self.scale = self.logits.std()
        if name != "rwkv, weights rescaled by depth":  # it saves what it has rescaled, and rescales it again
            assert self.far(logits(reloaded(self.model, folder / "uncut")), self.logits) < TOLERANCE
        try:
            cached = cached_logits(self.model)
        except (IndexError, RuntimeError, ValueError):  # generation does not work upstream
            cached = None
        # Mamba answers with more positions than it was asked for.
        self.has_cache = cached is not None and cached.shape == self.logits.shape
        self.has_cache = self.has_cache and self.far(cached, self.logits) < TOLERANCE

    def far(self, found, expected):
        return float((found - expected).abs().max() / self.scale)

    def check(self, label, layers):
        """Remove `layers`: None if that is exact, the reason if it is refused."""
        cut, config = copy.deepcopy(self.model), self.model.config.to_dict()
        try:
            remove_layers(cut, layers)
        except LayerPruneError as error:
            assert torch.equal(logits(cut), self.logits)
            assert cut.config.to_dict() == config
            return str(error)
        live = logits(cut)
        assert self.far(live, skipping(self.model, layers)) < TOLERANCE
        if set(layers) - set(IDLE.get(self.name, [])):
            assert self.far(live, self.logits) > 100 * TOLERANCE, "nothing would be seen here"
        assert self.far(logits(reloaded(cut, self.folder / label)), live) < TOLERANCE
        if self.has_cache:
            assert self.far(cached_logits(cut), live) < TOLERANCE
        return None


def check_all(name, sets, folder):
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checker = Checker(name, folder)
        return {label: checker.check(label, layers) for label, layers in sets.items()}


TABLE = Path(__file__).with_name("architectures.md")
NAMES = [name for name in TYPES if name not in NOT_BUILT]
NAMES += [name for name, (model_type, _) in VARIANTS.items() if model_type in TYPES]


@pytest.mark.parametrize("name", NAMES)
def test_exact_or_refused(name, tmp_path):
    reasons = check_all(name, SETS, tmp_path)
    if f"transformers {transformers.__version__}\n" in TABLE.read_text():
        row = next(row for row in TABLE.read_text().splitlines() if row.startswith(f"| {name} |"))
        published = row.split("|")[3].strip().split(", ")
        assert [label for label, reason in reasons.items() if reason] == [
            label for label in SETS if label in published
        ]


@pytest.mark.parametrize("name", sorted(NOT_BUILT.keys() & set(TYPES)))
def test_what_cannot_be_built_or_run_is_still_so(name):
    with pytest.raises((ValueError, AttributeError, ImportError, StrictDataclassError)):
        logits(tiny_model(name))


FOUND: dict[str, dict[str, str | None]] = {}


@pytest.mark.architectures
@pytest.mark.parametrize("name", NAMES)
def test_exact_or_refused_in_all_places(name, tmp_path):
    FOUND[name] = check_all(name, ALL_SETS, tmp_path)


@pytest.mark.architectures
def test_what_is_published_is_what_was_found():
    """Writes the table and README's count anew where they differ, and fails then: look, and commit."""
    if len(FOUND) < len(NAMES):
        pytest.skip("not all types were run, or not all of them passed")
    count = summary()
    readme = Path(__file__).parents[2] / "README.md"
    if f"transformers {transformers.__version__}" not in readme.read_text():
        pytest.skip("the published table is for another version of transformers")
    before, old, after = re.split(
        r"(?<=<!-- architectures -->\n)(.*?)(?=\n<!-- end)", readme.read_text(), flags=re.S
    )
    stale = [
        path
        for path, text, now in (
            (TABLE, TABLE.read_text(), full_table()),
            (readme, old, count),
        )
        if text != now
    ]
    TABLE.write_text(full_table())
    readme.write_text(before + count + after)
    assert not stale, f"{stale} did not say what this run found: written anew"


def summary():
    """README's count."""
    types = {name: list(FOUND[name].values()) for name in FOUND if name not in VARIANTS}
    exact = [name for name, reasons in types.items() if not any(reasons)]
    refused = [name for name, reasons in types.items() if all(reasons)]
    return textwrap.fill(
        f"A tiny model of each of the {len(TYPES)} causal language model types in transformers "
        f"{transformers.__version__} was tried. {len(exact)} types pass for each of {len(ALL_SETS)} sets of "
        "layers: the pruned and reloaded model gives the logits of the original with these layers skipped. "
        f"{len(types) - len(exact) - len(refused)} types do so for some sets, {len(refused)} are always "
        f"refused, and {len(NOT_BUILT)} could not be tried ([list](tests/surgery/architectures.md)).",
        120,
    )


def full_table():
    rows = [["model type", "cut exactly", "refused", "why"], ["---"] * 4]
    for name, reasons in FOUND.items():
        exact = [label for label, reason in reasons.items() if reason is None]
        refused = [label for label, reason in reasons.items() if reason]
        why = next((reason for reason in reasons.values() if reason), "").split("exactly: ")[-1][:160]
        where = "everywhere" if not refused else ", ".join(exact) or "nowhere"
        rows.append([name, where, ", ".join(refused), why.replace("|", "/")])
    rows += [[name, "", "", f"no tiny model: {reason}"] for name, reason in NOT_BUILT.items()]
    places = "; ".join(f"{label} {layers}" for label, layers in ALL_SETS.items())
    return (
        f"# Model types of transformers {transformers.__version__}\n\n"
        "Tiny random models of 7 layers. Cut exactly: the logits are those of the uncut model with these "
        "layers passed over, of the model reloaded by plain transformers, and of generation from the cache "
        "where the uncut model's own works. Refused: an error says why, and the model is as before.\n\n"
        f"Layers removed: {places}.\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    )
