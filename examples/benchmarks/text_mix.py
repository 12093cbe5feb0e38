"""A mix of encyclopedia, books and instructions to heal on, without any passage of the evaluation sets.

    python examples/benchmarks/text_mix.py DATA mix.jsonl [CHARACTERS]

CHARACTERS defaults to 12,000,000. Where a source has less than its share, Wikipedia makes up for it.
DATA holds folders of JSON lines. To take passages from: wikipedia_en_2015 (articles of the English Wikipedia,
`text`), books_public_domain (books of Standard Ebooks, `text`) and instruct (Dolly, GPTeacher's role play and
Alpaca with GPT-4's answers: `instruction`, `input`, `output`). Of the evaluation sets, on whose texts nothing
is trained: hellaswag, arc_easy, piqa, lambada_openai, sciq and boolq as on the hub, and c4_sample, from C4.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path


SHARES = {"wikipedia": 0.5, "books": 0.2, "instruct": 0.3}  # of the characters
CHARACTERS = 12_000_000
PASSAGE = 3000
EVALUATION = ("hellaswag", "arc_easy", "piqa", "lambada_openai", "sciq", "boolq", "c4_sample")
WORDS = 13  # in a row that no passage may share with an evaluation set


def rows(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)


def passages(text: str) -> Iterator[str]:
    """Pieces of a text that end where a paragraph does."""
    piece = ""
    for paragraph in text.split("\n"):
        piece += paragraph + "\n"
        if len(piece) >= PASSAGE:
            yield piece.strip()
            piece = ""


def instruction(row: dict) -> str:
    return "\n\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def word_runs(text: str) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def wikipedia(data: Path, characters: float) -> list[str]:
    """Passages from as many files as hold so many characters."""
    found: list[str] = []
    for path in sorted((data / "wikipedia_en_2015").glob("train-*.jsonl.gz")):
        if sum(map(len, found)) >= characters:
            break
        found += [piece for row in rows(path) for piece in passages(row["text"])]
    return found


def main(data: Path, output: Path, characters: float = CHARACTERS) -> None:
    forbidden: set[str] = set()
    for name in EVALUATION:
        if not any((data / name).glob("*.jsonl")):
            raise SystemExit(
                f"{data / name} holds no JSON lines: its texts could not be kept out of the mix."
            )
        for path in sorted((data / name).glob("*.jsonl")):
            for row in rows(path):
                forbidden.update(*map(word_runs, strings(row)))
    books = (row["text"] for row in rows(data / "books_public_domain" / "books.jsonl.gz"))
    instruct = (row for path in sorted((data / "instruct").glob("*.jsonl")) for row in rows(path))
    sources = {
        "books": [piece for text in books for piece in passages(text)],
        "instruct": [instruction(row) for row in instruct],
    }
    wanted = {name: min(SHARES[name] * characters, sum(map(len, sources[name]))) for name in sources}
    wanted["wikipedia"] = characters - sum(wanted.values())
    sources = {"wikipedia": wikipedia(data, wanted["wikipedia"])} | sources
    chosen = []
    for name, pieces in sources.items():
        random.Random(0).shuffle(pieces)
        size, taken, dropped = 0, 0, 0
        for piece in pieces:
            if size >= wanted[name]:
                break
            if word_runs(piece) & forbidden:
                dropped += 1
                continue
            chosen.append(piece)
            size, taken = size + len(piece), taken + 1
        print(f"{name}: {taken} passages, {size} characters; {dropped} dropped, with {WORDS} words of a set")
    random.Random(0).shuffle(chosen)
    with output.open("w") as file:
        file.writelines(json.dumps({"text": piece}) + "\n" for piece in chosen)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *map(float, sys.argv[3:]))
