"""Generates text with the model itself, for users without data: chats in its template, and documents."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError, one_line
from ..files import whole_file


logger = logging.getLogger(__name__)

SELF = "self"  # the name of the generated text as a data source
TEXTS_AT_ONCE = 16  # number of texts per batch; another number changes the random numbers and so the text
CONTENT = "CONTENT"  # placeholder for the user's message
LEAST_ROOM = 16  # tokens of a chat outside its template
CUT_CHARACTER = "\ufffd"  # the character that a tokenizer returns for an incomplete character


def write_own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    tokens: int,
    length: int,
    temperature: float = 1.0,
) -> list[dict[str, Any]]:
    """Returns text that a model generates.

    One half are chats in the model's chat template, if it has one. The other half are documents. Each batch
    is added to a file, so that a killed process continues after the last batch. The rows for a larger number
    of tokens include the rows for a smaller number.

    Args:
        model (`PreTrainedModel`): the model, in eval mode.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        path (`Path`): the JSON lines file to create or continue. It belongs to this model and these settings.
        tokens (`int`): number of tokens to generate.
        length (`int`): maximum number of tokens in one text.
        temperature (`float`, *optional*, defaults to 1.0): sampling temperature.

    Returns:
        `list[dict]`: rows with `text`, or with `messages` of a user and the assistant.

    Raises:
        LayerPruneError: the model generates no text.
    """
    rows, sampler = _read(path), _Sampler(model, tokenizer, temperature, length)
    forms = list(sampler.forms)
    share = -(-tokens // len(forms))  # tokens of each form

    def written() -> int:
        return sum(min(share, _count(rows, form)) for form in forms)

    with (
        torch.random.fork_rng(),
        tqdm(total=share * len(forms), initial=written(), unit=" tokens", desc="writing text") as bar,
    ):
        while written() < share * len(forms):
            batch = rows[-1]["batch"] + 1 if rows else 0
            torch.manual_seed(batch)
            form = min(forms, key=lambda form: _count(rows, form))
            new = sampler.forms[form]()
            if not new:
                raise LayerPruneError(
                    f"data is {SELF}, but the model ended {TEXTS_AT_ONCE} texts before their first word. "
                    "Give other text as data."
                )
            rows += [row | {"batch": batch} for row in new]
            _write(path, rows)
            bar.update(written() - bar.n)
    return [row for i, row in enumerate(rows) if _count(rows[:i], _form(row)) < share]


def _form(row: dict[str, Any]) -> str:
    return "messages" if "messages" in row else "text"


def _count(rows: list[dict[str, Any]], form: str) -> int:
    """Returns the number of tokens in the rows of one form."""
    return sum(row["tokens"] for row in rows if form in row)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())


def _said_by_user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


class _Sampler:
    """Samples batches of texts from a model.

    Args:
        model, tokenizer, temperature, length: see [`write_own_text`].

    Attributes:
        forms (`dict`): maps each form of rows to a function that returns a batch of rows.
    """

    def __init__(self, model: Any, tokenizer: Any, temperature: float, length: int) -> None:
        self.model, self.tokenizer, self.temperature, self.length = model, tokenizer, temperature, length
        named = model.generation_config.eos_token_id
        ends = named if isinstance(named, list) else [named]
        self.ends = [end for end in {tokenizer.eos_token_id, *ends} if end is not None]
        pads = [tokenizer.pad_token_id, *self.ends, 0]
        self.pad = next(pad for pad in pads if pad is not None)
        self.before, self.after = self._user_turn()
        self.forms = {"text": self.documents}
        if self.before:
            # The special token that ends the user's turn, if the template has such a token.
            first = self._encoded(self.after)[:1]
            self.ends += [token for token in first if token in tokenizer.all_special_ids]
            self.room = length - len(self._prompt(CONTENT)) + len(self._encoded(CONTENT))
            if self.room >= LEAST_ROOM:
                self.forms = {"messages": self.chats} | self.forms

    def _user_turn(self) -> tuple[str, str]:
        """Returns the text that the chat template writes before and after the user's message.

        Both are empty if there is no template, or if the template does not repeat the message.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            return "", ""
        try:
            text = self.tokenizer.apply_chat_template([_said_by_user(CONTENT)], tokenize=False)
        except Exception as error:  # a template is a program and can raise any error
            logger.warning("The model writes no chats, as its chat template fails: %s", one_line(error))
            return "", ""
        before, found, after = text.partition(CONTENT)
        return (before, after.strip() or after) if found and after else ("", "")

    def documents(self) -> list[dict[str, Any]]:
        """Returns texts that start like a document.

        The prompt is the beginning-of-text token, or else the token that ends the previous text.
        """
        added = self.tokenizer("")["input_ids"][:1]
        first = added or [token for token in (self.tokenizer.eos_token_id, self.pad) if token is not None][:1]
        written = self._sample([first] * TEXTS_AT_ONCE, self.length - 1)
        texts = [self._decoded(ids) for ids in written]
        counts = [len(ids) + 1 for ids in written]
        return [
            {"text": text, "tokens": count} for text, count in zip(texts, counts, strict=True) if text.strip()
        ]

    def chats(self) -> list[dict[str, Any]]:
        """Returns chats. The model generates the user's message, then the answer."""
        written = self._sample([self._encoded(self.before)] * TEXTS_AT_ONCE, self.room // 2)
        questions = [self._decoded(ids).split(self.after)[0].strip() for ids in written]
        talks = [[_said_by_user(question)] for question in questions if question]
        prompts = [self._prompt(question) for question in questions if question]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < self.length]
        if not fitting:
            return []
        prompts, talks = [prompts[i] for i in fitting], [talks[i] for i in fitting]
        answers = self._sample(prompts, self.length - max(map(len, prompts)))
        rows = []
        for talk, prompt, ids in zip(talks, prompts, answers, strict=True):
            answer = self._decoded(ids).split(self.after)[0].strip()
            if answer:
                messages = [*talk, {"role": "assistant", "content": answer}]
                rows.append({"messages": messages, "tokens": len(prompt) + len(ids)})
        return rows

    def _sample(self, prompts: list[list[int]], most: int) -> list[list[int]]:
        """Returns the continuation of each prompt: at most `most` tokens, up to the token that ends it."""
        width, device = max(map(len, prompts)), self.model.device
        padded = [[self.pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        settings: dict[str, Any] = {"do_sample": True, "temperature": self.temperature}
        settings |= {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": most}
        settings |= {"eos_token_id": self.ends or None, "pad_token_id": self.pad, "use_cache": True}
        found = self.model.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(**settings),
        )
        written = [row[width:] for row in found.tolist()]
        stops = [next((i for i, token in enumerate(row) if token in self.ends), len(row)) for row in written]
        return [row[:stop] for row, stop in zip(written, stops, strict=True)]

    def _prompt(self, question: str) -> list[int]:
        """Returns the tokens of a chat with this question, up to the start of the answer."""
        talk = [_said_by_user(question)]
        return self._encoded(
            self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        )

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip(CUT_CHARACTER)
