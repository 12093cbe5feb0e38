"""The one error that speaks to the person at the keyboard."""


class LayerPruneError(ValueError):
    """A mistake that the user can put right. The command line shows it as one line."""
