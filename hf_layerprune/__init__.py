"""Makes Hugging Face causal language models shallower, inside the Trainer.

The public names are imported when they are first used, so that `import hf_layerprune` is light. They are
declared in `__init__.pyi`, where type checkers and editors look for them.
"""

import re
from importlib import import_module
from typing import Any


with open(f"{__file__}i", encoding="utf-8") as _file:  # pathlib would make the import slower
    _HOMES = {name: home for home, name in re.findall(r"^from (\S+) import (\w+)", _file.read(), re.M)}

__all__ = sorted(_HOMES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-layerprune")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
