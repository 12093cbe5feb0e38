"""The error class of this package."""


class LayerPruneError(ValueError):
    """A mistake that the user can put right. The command line shows it as one line."""


def one_line(error: Exception, length: int = 300) -> str:
    """Returns the message of an error as one line, or its type if it has no message."""
    return " ".join(str(error).split())[:length] or type(error).__name__
