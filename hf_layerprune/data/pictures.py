"""Makes batches of rows with pictures and text, by the processor of a vision-language model."""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, LargeList, List, Value
from transformers.image_utils import load_image

from ..errors import LayerPruneError, one_line
from .sequences import IGNORED, end_tokens, start_tokens
from .texts import COLUMNS, PICTURES, Text, is_chat, is_empty, parts_of, text_of, tokenizer_of


SOURCES = ("image", "url", "path", "base64")  # keys of a picture in a part of a message, as in transformers
CHATS = ("messages", "conversations", "prompt", "completion")  # columns that may hold messages
MARK = "<image>"  # the place of a picture in text, as in the data of LLaVA


def hold_pictures(rows: Any) -> bool:
    """Returns whether at least one row holds a picture.

    Args:
        rows (`Dataset` or sequence of rows): rows of text, chats or prompts.
    """
    if not isinstance(rows, Dataset):
        return any(pictures_of(row) for row in rows)
    if any(_has_value(rows, name) for name in PICTURES if name in rows.column_names):
        return True
    chats = [name for name in CHATS if name in rows.column_names and not _is_plain(rows.features[name])]
    return any(pictures_of(row) for row in rows.select_columns(chats)) if chats else False


def _is_plain(kind: Any) -> bool:
    """Returns whether a column holds text, or messages of plain text, which have no parts."""
    entry = getattr(kind, "feature", kind)
    content = entry.get("content", entry.get("value")) if isinstance(entry, Mapping) else entry
    return isinstance(content, Value)


def _has_value(rows: Dataset, name: str) -> bool:
    """Returns whether a column has a value that is not null or empty. No picture is decoded."""
    kind = rows.features[name]
    for table in rows.select_columns([name]).with_format("arrow").iter(batch_size=1000):
        column = table.column(name).combine_chunks()
        if isinstance(kind, (List, LargeList)):
            if any(column.value_lengths().to_pylist()):
                return True
        elif any(column.to_pylist()) if isinstance(kind, Value) else column.null_count < len(column):
            return True
    return False


class PictureCollator:
    """Data collator that makes batches of rows with pictures by a processor.

    Each row is one sequence, which is padded on the right and never truncated. The pictures are in the column
    `images` or `image`, or in the parts of messages. If the content of all messages is plain text, the
    pictures take the places of `<image>` in it, or come before the first message of the user, as in trl.
    Padding and image tokens have no labels. The markers that some processors put between them have.

    Args:
        processor (`ProcessorMixin`): the model's processor.
        loss_on (`str`, *optional*, defaults to `"all"`): the tokens with labels: `"all"`, or `"completion"`
            for assistant turns and completions.
        column (`str`, *optional*, defaults to `"text"`): the column that holds plain text.

    Raises:
        LayerPruneError: the model does not read its text from left to right.
    """

    def __init__(self, processor: Any, loss_on: str = "all", column: str = "text") -> None:
        if type(processor).__name__ == "PaliGemmaProcessor":
            raise LayerPruneError(
                "PaliGemma reads a prompt in both directions, so the loss of its tokens means nothing. Give "
                "DistillationTrainer a data_collator that passes suffix= to the processor."
            )
        self.processor, self.loss_on, self.column = processor, loss_on, column
        tokenizer = tokenizer_of(processor)
        if tokenizer.pad_token is None:  # as for text
            tokenizer.pad_token = tokenizer.eos_token
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
        pictures = [[load_picture(picture) for picture in pictures_of(row)] for row in rows]
        begun = [text.text.startswith(self.start) for text in texts]  # by a chat template
        if any(begun):
            starts = ["" if has else self.start for has in begun]
            texts = [_moved(text, start) for text, start in zip(texts, starts, strict=True)]
        options: dict[str, Any] = {"padding": True, "padding_side": "right"}
        options["add_special_tokens"] = not any(begun)
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
        """Returns the text of a row for the processor, with the end-of-text token at its end.

        Raises:
            LayerPruneError: the row has no text, it has places for another number of pictures than it has, or
                the completions cannot be found.
        """
        found = text_of(in_parts(row), self.processor, column=self.column)
        if not found.text.strip():
            raise LayerPruneError("A row with pictures has no text. Leave such rows out.")
        mark = getattr(self.processor, "image_token", None) or MARK
        pictures, places = len(pictures_of(row)), found.text.count(mark)
        if places not in (0, pictures):  # 0: the text may name a picture by another token
            raise LayerPruneError(
                f"A row has {pictures} pictures, but {places} places for them in its text ({mark}). Give one "
                "for each."
            )
        text, spans = found.text + self.end, list(found.completions)
        if spans and spans[-1][1] == len(found.text):
            spans[-1] = spans[-1][0], len(text)  # the end-of-text token belongs to the last completion
        if self.loss_on == "completion" and (not spans or mark in text[spans[0][0] :]):
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
    for row in _undecoded(rows) if isinstance(rows, Dataset) else rows:
        first = first or row
        collator.text_of(row)
    if first is None:
        raise LayerPruneError("The data has no rows. Give at least one.")
    collator([first])


def _undecoded(rows: Dataset) -> Dataset:
    """Returns rows whose pictures are read as bytes or paths."""
    for name in PICTURES:
        kind = rows.features.get(name)
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def picture_dataset(rows: Iterable[Any], column: str = "text") -> Dataset:
    """Returns rows in memory as a data set with their text, chats or prompts and a column `images`.

    Raises:
        LayerPruneError: a picture cannot be read, or a column has values of different kinds.
    """
    names = tuple(dict.fromkeys((column, *COLUMNS, "completion")))
    formed = []
    for row in rows:
        columns = in_parts(row)
        columns = columns if isinstance(columns, Mapping) else {"text": columns}
        pictures = [_stored(picture) for picture in pictures_of(row)]
        formed.append({name: columns.get(name) for name in names} | {"images": pictures})
    found = [name for name in names if any(row[name] is not None for row in formed)]
    try:
        return Dataset.from_list([{name: row[name] for name in (*found, "images")} for row in formed])
    except (ValueError, TypeError) as error:  # of pyarrow
        raise LayerPruneError(
            f"The rows with pictures differ in form: {one_line(error)} Give all rows the same columns."
        ) from error


def _stored(picture: Any) -> dict[str, Any]:
    """Returns a picture as the path of its file, or as the bytes of one."""
    if isinstance(picture, Mapping):
        return {"bytes": picture.get("bytes"), "path": picture.get("path")}
    if isinstance(picture, str):
        return {"bytes": None, "path": picture}
    if isinstance(picture, bytes):
        return {"bytes": picture, "path": None}
    if Path(getattr(picture, "filename", "") or "").is_file():
        return {"bytes": None, "path": picture.filename}
    content = BytesIO()
    load_picture(picture).save(content, "png")
    return {"bytes": content.getvalue(), "path": None}


def pictures_of(row: Any) -> list[Any]:
    """Returns the pictures of a row, in order."""
    columns = row if isinstance(row, Mapping) else {}
    for name in PICTURES:
        if not is_empty(columns.get(name)):
            value = columns[name]
            return list(value) if isinstance(value, (list, tuple)) else [value]
    parts = [part for part in parts_of(row) if _is_picture(part)]
    return [part[key] for part in parts for key in SOURCES if part.get(key) is not None]


def load_picture(picture: Any) -> Any:
    """Returns a picture of Pillow, from a path, URL, base64 text, bytes, array or picture.

    Raises:
        LayerPruneError: the picture cannot be read.
    """
    from PIL import Image as Pictures  # an optional package of transformers

    name: Any = picture.get("path") if isinstance(picture, Mapping) else picture
    content = picture.get("bytes") if isinstance(picture, Mapping) else picture
    try:
        if isinstance(content, bytes):
            return load_image(Pictures.open(BytesIO(content)))
        return load_image(Pictures.fromarray(name) if isinstance(name, np.ndarray) else name)
    except Exception as error:  # a damaged picture or a server can raise any error
        is_text = isinstance(error, ValueError) and isinstance(name, str)
        reason = "it is no file, URL or base64 text." if is_text else one_line(error)
        raise LayerPruneError(
            f"The picture {str(name)[:80]!r} cannot be read: {reason} Paths are relative to the working "
            "directory."
        ) from error


def in_parts(row: Any) -> Any:
    """Returns a row whose messages are lists of parts, with a place for each picture. A bare chat becomes the
    column `messages`. Other rows are returned unchanged.

    Raises:
        LayerPruneError: the messages name another number of pictures than the row has.
    """
    columns = {"messages": row} if is_chat(row) else row
    if not isinstance(columns, Mapping):
        return row
    chats = {name: columns[name] for name in CHATS if is_chat(columns.get(name))}
    messages = [message for chat in chats.values() for message in chat]
    if not messages:
        return row
    count, parts = len(pictures_of(row)), sum(map(_is_picture, parts_of(row)))
    marks = sum(_content(message).count(MARK) for message in messages if isinstance(_content(message), str))
    if parts and parts != count:
        raise LayerPruneError(
            f"A row has {count} pictures, but {parts} image parts in its messages. Give one for each."
        )
    has_marks = not parts and marks == count
    first = next((one for one in messages if one.get("role", one.get("from")) in ("user", "human")), None)
    formed = {}
    for name, chat in chats.items():
        before = [count if one is first and not parts and not has_marks else 0 for one in chat]
        formed[name] = [_parted(one, places, has_marks) for one, places in zip(chat, before, strict=True)]
    return {**columns, **formed}


def _content(message: Mapping[str, Any]) -> Any:
    return message.get("content", message.get("value"))


def _parted(message: Mapping[str, Any], pictures: int, has_marks: bool) -> dict[str, Any]:
    """Returns a message whose content is a list of parts.

    Args:
        message (mapping): the message.
        pictures (`int`): number of pictures that come first.
        has_marks (`bool`): whether [`MARK`] is the place of a picture.
    """
    content, place = _content(message), {"type": "image"}
    if isinstance(content, str):
        pieces = re.split(f"({MARK})", content) if has_marks else [content]
        parts = [place if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece]
    else:  # rows of a Dataset have all keys in all parts
        given = [{key: value for key, value in part.items() if value is not None} for part in content or []]
        parts = [place if _is_picture(part) else part for part in given]
    key = "value" if "value" in message and "content" not in message else "content"
    return {**message, key: [place] * pictures + parts}


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _picture_tokens(processor: Any) -> list[int]:
    """Returns the tokens that stand for pictures."""
    tokens = [getattr(each, "image_token_id", None) for each in (processor, tokenizer_of(processor))]
    tokens += getattr(processor, "image_token_ids", None) or []
    return [token for token in tokens if isinstance(token, int)]


def _moved(text: Text, start: str) -> Text:
    """Returns a text that begins with `start`."""
    return Text(start + text.text, [(len(start) + a, len(start) + b) for a, b in text.completions])


def _in_completions(text: Text, offsets: torch.Tensor) -> torch.Tensor:
    """Returns for each token whether it is in a completion.

    The processor replaces each place of a picture by many tokens, so that characters behind it move. All
    completions are behind the pictures.

    Args:
        text ([`Text`]): the text before the processor replaced anything.
        offsets (`torch.Tensor`): first and last character of each token `(length, 2)`.
    """
    moved = int(offsets.max()) - len(text.text)
    counted = torch.zeros(len(offsets), dtype=torch.bool)
    for first, last in text.completions:
        counted |= (offsets[:, 0] < last + moved) & (offsets[:, 1] > first + moved)
    return counted
