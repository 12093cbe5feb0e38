"""Converts rows to text: plain text, chats, prompts with completions, and templates over columns."""

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import LayerPruneError, one_line
from .sources import load_rows, names_of


logger: Any = logging.get_logger(__name__)  # the logger of transformers has warning_once

COLUMNS = ("text", "messages", "conversations", "prompt")
# Columns and message parts that hold other things than text. The names are those of trl and chat templates.
PICTURES = ("image", "images")
MEDIA = (*PICTURES, "video", "videos", "audio", "audios")
MEDIA_PARTS = (*MEDIA, "image_url", "video_url", "audio_url", "input_audio")
# Maps the roles of ShareGPT conversations to the roles of chat templates.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Text:
    """The text of one row.

    Args:
        text (`str`): the text, with all special tokens that a chat template writes.
        completions (`list[tuple[int, int]]`): start and end of each completion or assistant turn, as
            character offsets. The end is exclusive. The list is empty for plain text.
    """

    text: str
    completions: list[tuple[int, int]] = field(default_factory=list)


def text_of(row: Any, tokenizer: Any = None, template: str | None = None, column: str = "text") -> Text:
    """Returns the text of a row.

    Args:
        row (`str`, messages, or `dict`): a string; a list of messages; or a row with the column `text`,
            `messages`, `conversations` (ShareGPT), or `prompt` and `completion`, as in trl.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's tokenizer. Its chat template formats
            messages. With a processor that reads pictures, the row may hold pictures.
        template (`str`, *optional*): a text with column names, for example `"{instruction}\\n{output}"`.
        column (`str`, *optional*, defaults to `"text"`): the column that holds plain text.

    Raises:
        LayerPruneError: the row has none of these forms, the chat template cannot format its messages, or
            the row holds media that `tokenizer` does not read.
    """
    if template is not None:
        return Text(_filled(template, row))
    if isinstance(row, str):
        return Text(row)
    _check_media(row, PICTURES if reads_pictures(tokenizer) else ())
    if is_chat(row):
        return _chat(row, tokenizer)
    if not isinstance(row, Mapping):
        raise unknown_form(row)
    if isinstance(row.get(column), str):
        return Text(row[column])
    for name in ("messages", "conversations"):
        if is_chat(row.get(name)):
            return _chat(row[name], tokenizer)
    if "prompt" in row and row["prompt"] is not None:
        return _prompt_and_completion(row["prompt"], row.get("completion"), tokenizer)
    if column != "text" and column not in row:
        raise LayerPruneError(f"The data has no field {column!r}, only {list(row)}. Name one of these.")
    if any(name in row for name in (column, *COLUMNS)):  # the column exists but is empty
        return Text("")
    raise unknown_form(row)


def _check_media(row: Any, read: Sequence[str]) -> None:
    """Checks that a row holds no media of other kinds than `read`. The placeholder tokens of a picture mean
    nothing without it.

    Raises:
        LayerPruneError: the row holds media of another kind.
    """
    columns = row if isinstance(row, Mapping) else {}
    others = [name for name in MEDIA if name not in read]
    found = [f"in column {name!r}" for name in others if not is_empty(columns.get(name))]
    kinds = [part.get("type") for part in parts_of(row) if isinstance(part, Mapping)]
    found += [
        f"as a part of type {kind!r} of a message"
        for kind in kinds
        if kind in MEDIA_PARTS and kind not in read
    ]
    if found:
        as_text = "with pictures" if read else "as text alone"
        raise LayerPruneError(
            f"The data holds media {found[0]}, but rows are read {as_text}. Pictures need a vision-language "
            "model with its processor, and no streaming. For other media, give DistillationTrainer a "
            "data_collator. To read text columns alone, set data_template, as '{text}'."
        )


def parts_of(row: Any) -> list[Any]:
    """Returns the parts of all messages of a row whose content is a list of parts, in order."""
    columns = row if isinstance(row, Mapping) else {}
    chats = [row, *(columns.get(name) for name in ("messages", "conversations", "prompt", "completion"))]
    contents = [message.get("content") for chat in filter(is_chat, chats) for message in chat]
    return [part for content in contents if isinstance(content, (list, tuple)) for part in content]


def reads_pictures(processing_class: Any) -> bool:
    """Returns whether a tokenizer or processor reads pictures."""
    return getattr(processing_class, "image_processor", None) is not None


def tokenizer_of(processing_class: Any) -> Any:
    """Returns the tokenizer of a processor, and a tokenizer or None unchanged."""
    if hasattr(processing_class, "bos_token_id"):  # some tokenizers have an attribute `tokenizer` too
        return processing_class
    return getattr(processing_class, "tokenizer", processing_class)


def is_empty(value: Any) -> bool:
    """Returns whether a value of a column is None or has no entries."""
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def iter_texts(
    rows: Iterable[Any],
    tokenizer: Any = None,
    template: str | None = None,
    column: str = "text",
    name: str = "The data",
) -> Iterator[Text]:
    """Yields the texts of rows. Skips empty texts and warns about them, also if iteration stops early.

    Args:
        rows (iterable), tokenizer, template, column: see [`text_of`].
        name (`str`, *optional*): name of the data in warnings.
    """
    read, skipped, where = 0, 0, ""
    try:
        for row in rows:
            read += 1
            text = text_of(row, tokenizer, template, column)
            if text.text.strip():
                yield text
                continue
            skipped += 1
            if template is None and isinstance(row, Mapping) and column in row:
                where = f" in {column!r}"
    finally:
        if skipped:
            logger.warning_once(f"{name}: {skipped} of {read} rows have no text{where} and are skipped.")


def load_texts(
    source: str | Path, field: str = "text", split: str = "train", config: str | None = None
) -> list[str]:
    """Returns the documents in a column of files or of a data set on the hub.

    Args:
        source (`str` or `Path`): see [`load_rows`].
        field (`str`, *optional*, defaults to `"text"`): the column that holds the text.
        split (`str`, *optional*, defaults to `"train"`): the split of a data set, for example
            `"train[:1000]"`.
        config (`str`, *optional*): the configuration of a data set.

    Raises:
        LayerPruneError: the file, data set or field does not exist, or it holds no text.
    """
    rows = load_rows(source, split, config)
    if field not in rows.column_names:
        raise LayerPruneError(f"{source} has no field {field!r}, only {rows.column_names}.")
    column = rows.select_columns([field])
    texts = [text.text for text in iter_texts(column, column=field, name=names_of([source]))]
    if not texts:
        raise LayerPruneError(f"There is no text in {source}.")
    return texts


def holds_text(row: Any, column: str = "text") -> bool:
    """Returns whether a row holds text, a chat or a prompt, not tokens."""
    if isinstance(row, Mapping):
        return "input_ids" not in row and any(name in row for name in (column, *COLUMNS))
    return isinstance(row, str) or is_chat(row)


def is_chat(value: Any) -> bool:
    """Returns whether a value is a list of chat messages, in the form of transformers or of ShareGPT."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    first = value[0]
    return isinstance(first, Mapping) and ("role" in first or {"from", "value"} <= set(first))


def unknown_form(entry: Any) -> LayerPruneError:
    """Returns the error for data that is not text."""
    what = f"a row with {list(entry)}" if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
    return LayerPruneError(
        f"The data holds {what}. Each row needs input_ids, or text in a column text, messages, "
        "conversations, or prompt and completion. For other columns give a template, as "
        "'{instruction}\\n{output}'."
    )


def _filled(template: str, row: Any) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise LayerPruneError(
            f"The template {template!r} cannot be read: {error}. Name columns in braces, as {{question}}. "
            "Double all other braces."
        ) from error
    missing = [name for name in names if not isinstance(row, Mapping) or name not in row]
    if missing or not names:
        columns = list(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        problem = f"names {missing[0]!r}, which the data lacks" if missing else "names no column"
        raise LayerPruneError(
            f"The template {template!r} {problem}. The data has {columns}. Name columns in braces, as "
            "{question}."
        )
    return template.format_map({name: "" if row[name] is None else row[name] for name in names})


def _messages(value: Any) -> list[dict[str, Any]]:
    """Returns messages with the keys that chat templates read."""
    found = []
    for message in value:
        if "role" in message:
            found.append({name: one for name, one in message.items() if one is not None})
            continue
        if message["from"] not in ROLES:
            raise LayerPruneError(
                f"A conversation has a turn from {message['from']!r}. Use one of {', '.join(ROLES)}."
            )
        found.append({"role": ROLES[message["from"]], "content": message["value"]})
    return found


def _chat(value: Any, tokenizer: Any, first: int = 0) -> Text:
    """Returns the text of messages. Only messages from index `first` on may be completions."""
    messages = _messages(value)
    text = _written(messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first:
            continue
        # The whole text must start with the text that the template writes for the turns so far.
        begin = _written(messages[:number], tokenizer, generates=True) if number else ""
        end = _written(messages[: number + 1], tokenizer)
        if not (text.startswith(begin) and text.startswith(end) and len(begin) < len(end)):
            return Text(text)
        spans.append((len(begin), len(end)))
    return Text(text, spans)


def _written(messages: list[dict[str, Any]], tokenizer: Any, generates: bool = False) -> str:
    found = [getattr(one, "chat_template", None) for one in (tokenizer, tokenizer_of(tokenizer))]
    template = found[0] or found[1]  # a processor may leave it to its tokenizer
    if template is None:
        raise LayerPruneError(
            "The data holds chat messages, but the tokenizer has no chat template. Use the tokenizer of a "
            "chat model, set tokenizer.chat_template, or give texts."
        )
    try:
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generates}
        if reads_pictures(tokenizer):
            settings["chat_template"] = template
        return tokenizer.apply_chat_template(messages, **settings)
    except Exception as error:  # a template is a program and can raise any error
        raise LayerPruneError(
            f"The chat template of the tokenizer cannot write these messages: {one_line(error)} Give texts, "
            "or a tokenizer with another chat template."
        ) from error


def _prompt_and_completion(prompt: Any, completion: Any, tokenizer: Any) -> Text:
    if is_chat(prompt):
        answer = list(completion) if is_chat(completion) else []
        return _chat([*prompt, *answer], tokenizer, first=len(prompt))
    parts = [part if isinstance(part, str) else "" for part in (prompt, completion)]
    text = "".join(parts)
    return Text(text, [(len(parts[0]), len(text))] if parts[1] else [])
