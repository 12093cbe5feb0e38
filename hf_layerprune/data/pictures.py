"""Makes batches of rows with pictures and text, by the processor of a vision-language model."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from transformers.image_utils import load_image

from ..errors import LayerPruneError, one_line
from .sequences import IGNORED, end_tokens, start_tokens
from .texts import PICTURES, Text, is_chat, is_empty, parts_of, reads_pictures, text_of, tokenizer_of


SOURCES = ("image", "url", "path", "base64")  # keys of a picture in a part of a message, as in transformers


def holds_pictures(rows: Any, processing_class: Any) -> bool:
    """Returns whether rows hold pictures that `processing_class` can read.

    Args:
        rows (`Dataset` or sequence of rows): rows of text, chats or prompts.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): a tokenizer reads no pictures.
    """
    if not reads_pictures(processing_class):
        return False
    names = getattr(rows, "column_names", None)
    if names is not None:
        if not {*PICTURES}.isdisjoint(names):
            return True
        rows = rows.select_columns(
            [name for name in names if name in ("messages", "conversations", "prompt")]
        )
    return any(_names_pictures(row) for row in rows)


def _names_pictures(row: Any) -> bool:
    in_columns = isinstance(row, Mapping) and any(name in row for name in PICTURES)
    return in_columns or any(_is_picture(part) for part in parts_of(row))


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


class PictureCollator:
    """Data collator that makes batches of rows with pictures by a processor.

    Each row is one sequence, which is padded on the right and never truncated. The pictures are in the column
    `images` or `image`, or in the parts of messages. If the content of all messages is plain text, the
    pictures come before the first message of the user, as in trl. Padding and the tokens of pictures have no
    labels.

    Args:
        processor (`ProcessorMixin`): the model's processor.
        loss_on (`str`, *optional*, defaults to `"all"`): the tokens with labels: `"all"`, or `"completion"`
            for assistant turns and completions.
        column (`str`, *optional*, defaults to `"text"`): the column that holds plain text.
    """

    def __init__(self, processor: Any, loss_on: str = "all", column: str = "text") -> None:
        self.processor, self.loss_on, self.column = processor, loss_on, column
        tokenizer = tokenizer_of(processor)
        self.start, self.end = (
            "".join(tokenizer.convert_ids_to_tokens(tokens))
            for tokens in (start_tokens(tokenizer), end_tokens(tokenizer))
        )

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Returns a batch of rows.

        Raises:
            LayerPruneError: a picture cannot be read, or the processor cannot read the rows.
        """
        texts = [self.text_of(row) for row in rows]
        pictures = [[_loaded(picture) for picture in pictures_of(row)] for row in rows]
        options = {"padding": True, "padding_side": "right", "add_special_tokens": False}
        if self.loss_on == "completion":
            options["return_offsets_mapping"] = True
        try:
            batch = self.processor(
                text=[text.text for text in texts],
                images=pictures if any(pictures) else None,
                return_tensors="pt",
                **options,
            )
        except (ValueError, TypeError, IndexError) as error:
            raise LayerPruneError(
                f"The processor cannot read these rows: {one_line(error)} Each picture needs its place in "
                "the text: an image part of a message, or the image token of the processor."
            ) from error
        batch = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        offsets = batch.pop("offset_mapping", None)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        labels = batch["input_ids"].masked_fill(~mask, IGNORED)
        for token in _picture_tokens(self.processor):
            labels[batch["input_ids"] == token] = IGNORED
        if offsets is not None:
            for row, text in enumerate(texts):
                outside = ~_in_completions(text, offsets[row][mask[row]])
                labels[row, : len(outside)][outside] = IGNORED
        return batch | {"labels": labels}

    def text_of(self, row: Any) -> Text:
        """Returns the text of a row for the processor, with the tokens at its start and end.

        Raises:
            LayerPruneError: the row has no text, the messages name another number of pictures than the row
                has, or the completions cannot be found.
        """
        found = text_of(_with_places(row), self.processor, column=self.column)
        if not found.text.strip():
            raise LayerPruneError("A row with pictures has no text. Leave such rows out.")
        start = "" if found.text.startswith(self.start) else self.start
        spans = [(len(start) + first, len(start) + last) for first, last in found.completions]
        text = start + found.text + self.end
        if spans and spans[-1][1] == len(start) + len(found.text):
            spans[-1] = spans[-1][0], len(text)  # the end-of-text token belongs to the last completion
        if self.loss_on == "completion":
            mark = getattr(self.processor, "image_token", None)
            if not spans or (mark and mark in text[spans[0][0] :]):
                raise LayerPruneError(
                    "loss_on is 'completion', but the completion of a row with pictures cannot be told: the "
                    "row is plain text, has no assistant turn, or has a picture after the first one. Set "
                    "loss_on to 'all', or give rows with prompt and completion."
                )
        return Text(text, spans)


def check_pictures(rows: Iterable[Any], collator: PictureCollator) -> None:
    """Checks the text of all rows, and one batch of the first row, before any long work.

    Raises:
        LayerPruneError: see [`PictureCollator`].
    """
    first = None
    for row in rows:
        first = first or row
        collator.text_of(row)
    if first is None:
        raise LayerPruneError("There is no row to train on. Give more rows.")
    collator([first])


def pictures_of(row: Any) -> list[Any]:
    """Returns the pictures of a row, in order."""
    columns = row if isinstance(row, Mapping) else {}
    for name in PICTURES:
        if not is_empty(columns.get(name)):
            value = columns[name]
            return list(value) if isinstance(value, (list, tuple)) else [value]
    parts = [part for part in parts_of(row) if _is_picture(part)]
    return [part[key] for part in parts for key in SOURCES if part.get(key) is not None]


def _loaded(picture: Any) -> Any:
    """Returns a picture that a processor reads, from a path, URL, base64 text, bytes or picture.

    Raises:
        LayerPruneError: the picture cannot be read.
    """
    name: Any = picture.get("path") if isinstance(picture, Mapping) else picture
    content = picture.get("bytes") if isinstance(picture, Mapping) else picture
    try:
        if isinstance(content, bytes):
            from PIL import Image  # an optional package of transformers

            return load_image(Image.open(BytesIO(content)))
        return load_image(name) if isinstance(name, str) or hasattr(name, "convert") else name
    except Exception as error:  # a damaged picture or a server can raise any error
        is_text = isinstance(error, ValueError) and isinstance(name, str)
        reason = "it is no file, URL or base64 text." if is_text else one_line(error)
        raise LayerPruneError(
            f"The picture {str(name)[:80]!r} cannot be read: {reason} Paths are relative to the working "
            "directory."
        ) from error


def _with_places(row: Any) -> Any:
    """Returns a row whose messages are lists of parts, with a place for each picture.

    Raises:
        LayerPruneError: the messages name another number of pictures than the row has.
    """
    names = ("messages", "conversations", "prompt", "completion")
    chats = {name: row[name] for name in names if isinstance(row, Mapping) and is_chat(row.get(name))}
    if is_chat(row):
        chats = {"messages": row}
    if not chats:
        return row
    count, parts = len(pictures_of(row)), [part for part in parts_of(row) if _is_picture(part)]
    places = 0 if parts else count
    if parts and len(parts) != count:
        raise LayerPruneError(
            f"A row has {count} pictures, but {len(parts)} image parts in its messages. Give one for each."
        )
    formed = dict(row) if isinstance(row, Mapping) else {}
    for name, chat in chats.items():
        formed[name] = []
        for message in chat:
            role = message.get("role", message.get("from"))
            has_places = places and role in ("user", "human")
            formed[name].append(_in_parts(message, places if has_places else 0))
            places = 0 if has_places else places
    return formed


def _in_parts(message: Mapping[str, Any], pictures: int) -> dict[str, Any]:
    """Returns a message whose content is a list of parts, with this number of pictures first."""
    key = "content" if "content" in message else "value"
    content = message[key]
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    else:  # rows of a Dataset have all keys in all parts
        parts = [{name: value for name, value in part.items() if value is not None} for part in content or []]
    return {**message, key: [{"type": "image"}] * pictures + parts}


def _picture_tokens(processor: Any) -> list[int]:
    """Returns the tokens that stand for pictures."""
    tokens = [getattr(each, "image_token_id", None) for each in (processor, tokenizer_of(processor))]
    return [token for token in tokens if isinstance(token, int)]


def _in_completions(text: Text, offsets: torch.Tensor) -> torch.Tensor:
    """Returns for each token whether it is in a completion.

    The processor replaces each place of a picture by many tokens, so that characters behind it move. All
    completions are behind the pictures.

    Args:
        text ([`Text`]): the text before the processor replaced anything.
        offsets (`torch.Tensor`): first and last character of each token `(length, 2)`.
    """
    moved = int(offsets[-1, 1]) - len(text.text)
    counted = torch.zeros(len(offsets), dtype=torch.bool)
    for first, last in text.completions:
        counted |= (offsets[:, 0] < last + moved) & (offsets[:, 1] > first + moved)
    return counted
