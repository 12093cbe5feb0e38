"""Caches a teacher's top-k or sampled logits: computed once, read in any number of runs and epochs."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batches import iterate_batches
from ..data.targets import Batch
from ..errors import LayerPruneError
from ..files import whole_file
from ..forward.hooks import LAST, captured, hidden, undisturbed
from ..forward.lm_head import ChunkedLMHead
from ..surgery.decoder import check_next_token, text_config
from ..surgery.lineage import Lineage, get_lineage, plain_int
from .losses import TopKLogProbs, top_k_log_probs
from .sampled_tokens import SampledTokens, sample_tokens


HEAD = "teacher_cache.json"
SHARD = 2**15  # number of positions in a file


def is_teacher_cache(folder: str | Path) -> bool:
    """Returns whether a folder holds cached logits instead of a model."""
    return (Path(folder) / HEAD).exists()


def cache_teacher_logits(
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    folder: str | Path,
    top_k: int = 64,
    temperature: float = 1.0,
    hidden_layers: Sequence[int] = (),
    sampling: bool = False,
) -> None:
    """Caches the teacher's logits, so that training with `teacher_model=folder` needs no teacher in memory.

    For each position the cache holds the top-k tokens, their log-probabilities, the log-probability of all
    other tokens together, and the hidden states of `hidden_layers`. With `sampling` it holds tokens sampled
    from the teacher's distribution instead. The gradient of their KL divergence equals on average the
    gradient over all tokens.

    Rows are looked up by their tokens, so training may use another order, padding and batch size. A second
    call computes only the missing rows.

    Args:
        teacher (`PreTrainedModel`): the teacher.
        batches (iterable of `dict`): `input_ids` `(batch, length)` and the other inputs of the model, in the
            form of the trainer's collator. Include the evaluation data if the trainer evaluates.
        folder (`str` or `Path`): a new folder or an earlier cache. A position takes `8 * top_k + 4` bytes, or
            `4 * top_k + 4` bytes with `sampling`. Each of `hidden_layers` adds a hidden state in the model's
            precision.
        top_k (`int`, *optional*, defaults to 64): number of tokens per position.
        temperature (`float`, *optional*, defaults to 1.0): the temperature of training.
        hidden_layers (`list[int]`, *optional*): the layers whose outputs to cache, as original indices.
        sampling (`bool`, *optional*, defaults to `False`): sample `top_k` tokens from the teacher's
            distribution instead of taking the most probable tokens (2503.16870). Training then needs
            `divergence="kl"`.

    Raises:
        LayerPruneError: a setting is invalid, or the folder holds other files or another cache.
    """
    check_next_token(teacher, "cache_teacher_logits")
    top_k, hidden_layers = plain_int(top_k), [plain_int(layer) for layer in hidden_layers]
    settings = _settings(teacher, top_k, temperature, hidden_layers) | {"sampling": sampling}
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        cache = CachedTeacherLogits(folder)
        different = sorted(name for name in settings if cache.settings.get(name, False) != settings[name])
        if different:
            raise LayerPruneError(
                f"{folder} holds cached logits with another {', '.join(different)}. Choose a new folder."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # The teacher's name is used to find its tokenizer. It is not a setting: a copy has the same logits.
        head = settings | {"teacher": teacher.name_or_path}
        with whole_file(folder / HEAD) as file:
            file.write(json.dumps(head, indent=1).encode())
        cache = CachedTeacherLogits(folder)
    keys, files = cache.keys, cache.files
    parts: list[dict[str, torch.Tensor]] = []  # computed rows that are not yet written
    positions = 0
    layers = {_tensor_name(layer): _present_index(layer, get_lineage(teacher)) for layer in hidden_layers}
    lm_head = None
    batches = iterate_batches(batches)
    with undisturbed(teacher):
        for batch in tqdm(batches, desc="Cache teacher logits"):
            new = {key: row for row, key in enumerate(row_keys(batch)) if key not in keys}
            if new:
                rows = {name: value[[*new.values()]].to(teacher.device) for name, value in batch.items()}
                lm_head = lm_head or ChunkedLMHead(teacher, rows["input_ids"])
                parts.append(_compute_rows(lm_head, rows, [*new], layers, settings))
                keys |= new.keys()
                positions += len(parts[-1]["ids"])
            if positions >= SHARD:
                files, parts, positions = _write_shard(folder, files, parts), [], 0
    if parts:
        _write_shard(folder, files, parts)


def _settings(
    teacher: PreTrainedModel, top_k: int, temperature: float, hidden_layers: Sequence[int]
) -> dict[str, Any]:
    """Returns the settings that determine the cached logits, besides the text.

    Raises:
        LayerPruneError: a setting is invalid.
    """
    config, lineage = text_config(teacher.config), get_lineage(teacher)
    if not 0 < top_k < config.vocab_size:
        raise LayerPruneError(f"top_k is {top_k}: it must be above 0 and below {config.vocab_size}.")
    if not 0 < temperature < float("inf"):
        raise LayerPruneError(f"temperature is {temperature}: it must be above 0.")
    unknown = sorted(set(hidden_layers) - set(lineage.kept))
    if unknown:
        raise LayerPruneError(f"hidden_layers: the teacher has no layers {unknown}.")
    ids = torch.arange(16, device=teacher.device)[None] % config.vocab_size
    with undisturbed(teacher):
        logits = teacher(input_ids=ids, use_cache=False).logits[0]
    return {
        "top_k": top_k,
        "temperature": temperature,
        "hidden_layers": sorted(set(hidden_layers)),
        "original_layers": lineage.original,
        "kept_layers": lineage.kept,
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "weights": logits.argmax(-1).tolist(),  # a fingerprint: predictions for fixed tokens
    }


def _compute_rows(
    lm_head: ChunkedLMHead,
    batch: Batch,
    keys: list[bytes],
    layers: dict[str, int],
    settings: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Returns the tensors of the rows with these keys, for all positions except the last of each row."""
    mask = _not_padding(batch)
    mask &= mask.flip(1).cumsum(1).flip(1) > 1  # the last token has no next token
    with captured(lm_head.model, layers.values()) as states:
        last_hidden_state = lm_head.states(batch)[mask]
    if any(hidden(output).dim() != 3 for _, output in states.values()):
        raise LayerPruneError(
            "The layers of this model return several hidden states, which cannot be cached. Leave "
            "hidden_layers out."
        )
    logits, count, temperature = lm_head.rows(last_hidden_state), settings["top_k"], settings["temperature"]
    values: dict[str, torch.Tensor] = {}
    if settings["sampling"]:
        offsets = _offsets(keys, mask).to(mask.device)
        samples, place = [], 0
        for chunk in logits:
            samples.append(sample_tokens(chunk, count, offsets[place : place + len(chunk)], temperature))
            place += len(chunk)
        values["ids"] = torch.cat([sample.ids for sample in samples])
        values["entropy"] = torch.cat([sample.entropy for sample in samples])[:, None]
    else:
        parts = [top_k_log_probs(chunk, count, temperature) for chunk in logits]
        values["ids"] = torch.cat([part.ids for part in parts])
        values["log_probs"] = torch.cat([part.log_probs for part in parts])
    return {
        "keys": torch.tensor([[*key] for key in keys], dtype=torch.uint8),
        "counts": mask.sum(1).cpu(),
        **{name: (value.int() if name == "ids" else value).cpu() for name, value in values.items()},
        **{
            name: (states[layer][0] if layer == LAST else hidden(states[layer][1]))[mask].cpu()
            for name, layer in layers.items()
        },
    }


def _offsets(keys: list[bytes], mask: torch.Tensor) -> torch.Tensor:
    """Returns a random number for each position in `mask`.

    The number depends only on the row, so that every order of the rows gives the same cache.
    """
    numbers = []
    for key, count in zip(keys, mask.sum(1).tolist(), strict=True):
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        numbers.append(torch.rand(count, generator=generator))
    return torch.cat(numbers)


def _write_shard(folder: Path, number: int, parts: list[dict[str, torch.Tensor]]) -> int:
    """Writes one file. Returns the number of the next file."""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with whole_file(folder / f"outputs-{number:05d}.safetensors") as file:
        file.write(save(tensors))
    return number + 1


def _tensor_name(layer: int) -> str:
    return f"hidden.{layer}"


def _present_index(layer: int, lineage: Lineage) -> int:
    """Returns the present index of an original layer; for the last layer the index of the LM head's input."""
    return LAST if layer == lineage.original - 1 else lineage.kept.index(layer)


class CachedTeacherLogits:
    """Reads the cached logits of a teacher from [`cache_teacher_logits`], in place of a [`ChunkedLMHead`].

    Args:
        folder (`str` or `Path`): the folder of the cache.

    Raises:
        LayerPruneError: the folder holds no cache, or the cache is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((self.folder / HEAD).read_text(encoding="utf-8"))
            self.settings = settings
            self.lineage = Lineage(settings["original_layers"], settings["kept_layers"])
            self.vocabulary, self.width = int(settings["vocabulary"]), int(settings["width"])
            self.top_k, self.temperature = int(settings["top_k"]), float(settings["temperature"])
            self.sampling = bool(settings.get("sampling", False))
            self.hidden_layers: list[int] = settings["hidden_layers"]
            self._files = [safe_open(path, "pt") for path in sorted(self.folder.glob("*.safetensors"))]
            self._rows = dict(self._index())
        except FileNotFoundError as error:
            raise LayerPruneError(f"{folder} holds no cached teacher logits.") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise LayerPruneError(f"The cached teacher logits in {folder} are damaged: {error}") from error

    def _index(self) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
        for number, file in enumerate(self._files):
            keys, ends = file.get_tensor("keys"), file.get_tensor("counts").cumsum(0).tolist()
            for key, start, end in zip(keys, [0, *ends], ends, strict=False):
                yield bytes(key.tolist()), (number, start, end)

    @property
    def keys(self) -> set[bytes]:
        """Returns the [`row_keys`] of all cached rows."""
        return set(self._rows)

    @property
    def files(self) -> int:
        """Returns the number of files."""
        return len(self._files)

    def check_has(self, batch: Batch) -> None:
        """Checks that all rows of a batch are cached.

        Raises:
            LayerPruneError: a row is missing.
        """
        for key, ids in zip(row_keys(batch), batch["input_ids"], strict=True):
            if key not in self._rows:
                raise LayerPruneError(
                    f"{self.folder} holds the teacher's logits of {len(self._rows)} rows, but not of the one "
                    f"that begins with tokens {ids[:8].tolist()}. Call cache_teacher_logits with this data "
                    "and the trainer's collator, evaluation data too: it adds the missing rows."
                )

    def read(
        self, batch: Batch, layers: Sequence[int]
    ) -> tuple[TopKLogProbs | SampledTokens, dict[int, Any]]:
        """Returns the cached logits and hidden states of a batch.

        They are zero at padding and at the last token of a row.

        Args:
            batch (`dict`): `input_ids` `(batch, length)` and the other inputs of the model.
            layers (`list[int]`): the layers whose hidden states are returned, as present indices of the
                teacher or [`~hf_layerprune.forward.hooks.LAST`].

        Returns:
            `tuple`: the top-k or sampled tokens `(batch, length, k)`, and a `dict` that holds the output
            `(batch, length, hidden)` of each layer twice, in the places of input and output in [`captured`].

        Raises:
            LayerPruneError: a row is missing.
        """
        self.check_has(batch)
        ids = batch["input_ids"]
        names = {layer: _tensor_name(self._original_index(layer)) for layer in layers}
        tensors: dict[str, torch.Tensor] = {}
        for row, (key, mask) in enumerate(zip(row_keys(batch), _not_padding(batch), strict=True)):
            number, start, end = self._rows[key]
            for name in ("ids", "entropy" if self.sampling else "log_probs", *names.values()):
                part = self._files[number].get_slice(name)[start:end]
                tensor = tensors.setdefault(name, part.new_zeros(*ids.shape, part.shape[-1]))
                tensor[row, mask.nonzero()[:-1, 0].cpu()] = part
        tensors = {name: value.to(ids.device) for name, value in tensors.items()}
        states = {layer: (tensors[name],) * 2 for layer, name in names.items()}
        if self.sampling:
            return SampledTokens(tensors["ids"].long(), tensors["entropy"][..., 0]), states
        return TopKLogProbs(tensors["ids"].long(), tensors["log_probs"]), states

    def _original_index(self, layer: int) -> int:
        return self.lineage.original - 1 if layer == LAST else self.lineage.kept[layer]

    def head(self, cached: TopKLogProbs | SampledTokens) -> TopKLogProbs | SampledTokens:
        """Returns the cached logits unchanged, because no LM head runs."""
        return cached

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Does nothing, because there is no LM head to cast."""
        yield


def row_keys(batch: Batch) -> list[bytes]:
    """Returns a fingerprint of the model inputs in each row, independent of padding and labels.

    Raises:
        LayerPruneError: the rows hold other inputs than tokens, for example pixels.
    """
    names = sorted(set(batch) - {"labels", "attention_mask"})
    for name in names:
        if batch[name].shape[:2] != batch["input_ids"].shape:
            raise LayerPruneError(
                f"The rows have {name} beside their tokens, but the teacher's logits are cached for text "
                "alone. Give the teacher itself as teacher_model."
            )
    keys = []
    for row, mask in enumerate(_not_padding(batch)):
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(name.encode())
            digest.update(batch[name][row][mask].cpu().double().numpy().tobytes())
        keys.append(digest.digest())
    return keys


def _not_padding(batch: Batch) -> torch.Tensor:
    """Returns a mask `(batch, length)` of the tokens that are not padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
