"""The error class of this package, and parts of its messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class LayerPruneError(ValueError):
    """A mistake that the user can put right. The command line shows it as one line."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns a question with the name closest to `given`, or an empty string if none is close.

    A name is close if it is spelled alike, or if `given` is one of its words, as `seed` in `scoring_seed`.
    """
    names = list(allowed)
    words = [name for name in names if given.strip("-") in name.strip("-").split("_")]
    close = get_close_matches(given, names, 1) or words
    return f"Did you mean {close[0]}?" if close else ""


def choose_from(given: str, allowed: Iterable[str]) -> str:
    """Returns advice that names all allowed values, and first the one closest to `given`."""
    names = list(allowed)
    return f"{did_you_mean(given, names)} Choose from {', '.join(names)}".lstrip()


def one_line(error: Exception, length: int = 300) -> str:
    """Returns the message of an error as one line, or its type if it has no message."""
    return " ".join(str(error).split())[:length] or type(error).__name__
