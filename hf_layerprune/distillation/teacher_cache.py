"""What a teacher said of a text, on disk: written once, read for as many runs and epochs as wanted."""

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

from ..data import Batch, one_by_one
from ..errors import LayerPruneError
from ..files import whole_file
from ..forward.hooks import LAST, captured, hidden, undisturbed
from ..forward.lm_head import Reader
from ..surgery.decoder import check_next_token, text_config
from ..surgery.lineage import Lineage, get_lineage, plain_int
from .losses import Likeliest, likeliest


HEAD = "teacher_outputs.json"
SHARD = 2**15  # positions in a file


def write_teacher_outputs(
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    folder: str | Path,
    top_k: int = 64,
    temperature: float = 1.0,
    hidden_layers: Sequence[int] = (),
) -> None:
    """Write what `teacher` says of a text, so that `teacher_model=folder` teaches without it.

    At each position the likeliest tokens and their log-probabilities, that of all others together, and
    chosen hidden states, by what the rows say: order, padding, epochs and batch size of training may be
    others. Stopped and called again, or called with more text, it goes on with the rows that are missing.

    Args:
        teacher (`PreTrainedModel`): the model.
        batches (iterable of `dict`): `input_ids` `(batch, length)` and what else the model reads, as the
            trainer's collator makes it; of evaluation too, if the trainer will evaluate.
        folder (`str` or `Path`): a new folder, or one that this wrote. A position takes `8 * top_k + 4`
            bytes, and the width of the model in its precision for each of `hidden_layers`.
        top_k (`int`, *optional*, defaults to 64): how many tokens.
        temperature (`float`, *optional*, defaults to 1.0): that of training.
        hidden_layers (`list[int]`, *optional*): whose outputs to keep, by index in the original model.

    Raises:
        LayerPruneError: a setting cannot be, or the folder holds something else.
    """
    check_next_token(teacher, "write_teacher_outputs")
    top_k, hidden_layers = plain_int(top_k), [plain_int(layer) for layer in hidden_layers]
    settings = _settings(teacher, top_k, temperature, hidden_layers)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        found = TeacherOutputs(folder)
        other = sorted(name for name in settings if found.settings.get(name) != settings[name])
        if other:
            raise LayerPruneError(
                f"{folder} holds outputs with another {', '.join(other)}: name a new folder."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # Where the teacher is from tells its tokenizer; the same one may be written from elsewhere, too.
        head = settings | {"teacher": teacher.name_or_path}
        with whole_file(folder / HEAD) as file:
            file.write(json.dumps(head, indent=1).encode())
        found = TeacherOutputs(folder)
    keys, files, done, waiting = found.keys, found.files, [], 0
    layers = {_name(layer): _own(layer, get_lineage(teacher)) for layer in hidden_layers}
    reader = None
    batches = one_by_one(batches)
    with undisturbed(teacher):
        for batch in tqdm(batches, desc="Teacher outputs"):
            new = {key: row for row, key in enumerate(row_keys(batch)) if key not in keys}
            if new:
                rows = {name: value[[*new.values()]].to(teacher.device) for name, value in batch.items()}
                reader = reader or Reader(teacher, rows["input_ids"])
                done.append(_read(reader, rows, [*new], layers, top_k, temperature))
                keys |= new.keys()
                waiting += len(done[-1]["ids"])
            if waiting >= SHARD:
                files, done, waiting = _write_shard(folder, files, done), [], 0
    if done:
        _write_shard(folder, files, done)


def _settings(
    teacher: PreTrainedModel, top_k: int, temperature: float, hidden_layers: Sequence[int]
) -> dict[str, Any]:
    """What the outputs depend on, beside the text.

    Raises:
        LayerPruneError: a setting cannot be.
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
        said = teacher(input_ids=ids, use_cache=False).logits[0]
    return {
        "top_k": top_k,
        "temperature": temperature,
        "hidden_layers": sorted(set(hidden_layers)),
        "original_layers": lineage.original,
        "kept_layers": lineage.kept,
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "weights": said.argmax(-1).tolist(),  # by what they make of some tokens
    }


def _read(
    reader: Reader,
    batch: Batch,
    keys: list[bytes],
    layers: dict[str, int],
    top_k: int,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """What is said of the rows with these keys: at each token but the last, one after the other."""
    said = _real(batch)
    said &= said.flip(1).cumsum(1).flip(1) > 1
    with captured(reader.model, layers.values()) as seen:
        states = reader.states(batch)[said]
    if any(hidden(after).dim() != 3 for _, after in seen.values()):
        raise LayerPruneError(
            "The layers of this model pass on several streams, which cannot be kept: leave hidden_layers out."
        )
    parts = [likeliest(rows, top_k, temperature) for rows in reader.rows(states)]
    found = {name: seen[layer] for name, layer in layers.items()}
    return {
        "keys": torch.tensor([[*key] for key in keys], dtype=torch.uint8),
        "counts": said.sum(1).cpu(),
        "ids": torch.cat([part.ids for part in parts]).int().cpu(),
        "log_probs": torch.cat([part.log_probs for part in parts]).cpu(),
        **{
            name: (before if layers[name] == LAST else hidden(after))[said].cpu()
            for name, (before, after) in found.items()
        },
    }


def _write_shard(folder: Path, number: int, parts: list[dict[str, torch.Tensor]]) -> int:
    """Write one file; return the number of the next."""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with whole_file(folder / f"outputs-{number:05d}.safetensors") as file:
        file.write(save(tensors))
    return number + 1


def _name(layer: int) -> str:
    return f"hidden.{layer}"


def _own(layer: int, lineage: Lineage) -> int:
    """The present index of an original layer; for the last one, what the output head reads."""
    return LAST if layer == lineage.original - 1 else lineage.kept.index(layer)


class TeacherOutputs:
    """What [`write_teacher_outputs`] wrote, read as a [`Reader`] reads.

    Args:
        folder (`str` or `Path`): where it is.

    Raises:
        LayerPruneError: it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((self.folder / HEAD).read_text(encoding="utf-8"))
            self.settings = settings
            self.lineage = Lineage(settings["original_layers"], settings["kept_layers"])
            self.vocabulary, self.width = int(settings["vocabulary"]), int(settings["width"])
            self.top_k, self.temperature = int(settings["top_k"]), float(settings["temperature"])
            self.hidden_layers: list[int] = settings["hidden_layers"]
            self._files = [safe_open(path, "pt") for path in sorted(self.folder.glob("*.safetensors"))]
            self._rows = dict(self._index())
        except FileNotFoundError as error:
            raise LayerPruneError(f"{folder} holds no teacher outputs.") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise LayerPruneError(f"The teacher outputs in {folder} are damaged: {error}") from error

    def _index(self) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
        for number, file in enumerate(self._files):
            keys, ends = file.get_tensor("keys"), file.get_tensor("counts").cumsum(0).tolist()
            for key, start, end in zip(keys, [0, *ends], ends, strict=False):
                yield bytes(key.tolist()), (number, start, end)

    @property
    def keys(self) -> set[bytes]:
        """The [`row_keys`] that are there."""
        return set(self._rows)

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self._files)

    def check_has(self, batch: Batch) -> None:
        """Check that all rows are there.

        Raises:
            LayerPruneError: one is not.
        """
        for key, ids in zip(row_keys(batch), batch["input_ids"], strict=True):
            if key not in self._rows:
                raise LayerPruneError(
                    f"{self.folder} holds what a teacher said of {len(self._rows)} rows, but not of the one "
                    f"that begins with tokens {ids[:8].tolist()}. Write them of this data, as the same "
                    "collator makes it (evaluation data too): write_teacher_outputs adds what is missing."
                )

    def read(self, batch: Batch, layers: Sequence[int]) -> tuple[Likeliest, dict[int, Any]]:
        """What the teacher said of a batch, zero where nothing follows.

        Args:
            batch (`dict`): `input_ids` `(batch, length)` and what else the model reads.
            layers (`list[int]`): whose hidden states are wanted, by the teacher's own index or
                [`~hf_layerprune.forward.hooks.LAST`].

        Returns:
            The likeliest tokens `(batch, length, k)`, and for each layer its output `(batch, length, hidden)`
            twice, as [`captured`] has it.

        Raises:
            LayerPruneError: a row is not there.
        """
        self.check_has(batch)
        ids, names = batch["input_ids"], {layer: _name(self._original(layer)) for layer in layers}
        found: dict[str, torch.Tensor] = {}
        for row, (key, real) in enumerate(zip(row_keys(batch), _real(batch), strict=True)):
            number, start, end = self._rows[key]
            for name in ("ids", "log_probs", *names.values()):
                part = self._files[number].get_slice(name)[start:end]
                whole = found.setdefault(name, part.new_zeros(*ids.shape, part.shape[-1]))
                whole[row, real.nonzero()[:-1, 0].cpu()] = part
        found = {name: value.to(ids.device) for name, value in found.items()}
        states = {layer: (found[name],) * 2 for layer, name in names.items()}
        return Likeliest(found["ids"].long(), found["log_probs"]), states

    def _original(self, layer: int) -> int:
        return self.lineage.original - 1 if layer == LAST else self.lineage.kept[layer]

    def head(self, said: Likeliest) -> Likeliest:
        """What the head makes of states is there already."""
        return said

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """There is nothing to cast."""
        yield


def row_keys(batch: Batch) -> list[bytes]:
    """A fingerprint of what each row of a batch says to a model, whatever its padding and labels."""
    names = sorted(set(batch) - {"labels", "attention_mask"})
    found = []
    for row, real in enumerate(_real(batch)):
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(name.encode())
            digest.update(batch[name][row][real].cpu().double().numpy().tobytes())
        found.append(digest.digest())
    return found


def _real(batch: Batch) -> torch.Tensor:
    """Which tokens are no padding, `(batch, length)`."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
