"""The one error that speaks to the person at the keyboard."""


class LayerPruneError(ValueError):
    """A mistake that the user can put right. The command line shows it as one line."""


def one_line(error: Exception, length: int = 300) -> str:
    """What an error says, or its name if it says nothing, fit to stand in the middle of a sentence."""
    return " ".join(str(error).split())[:length] or type(error).__name__
