"""Changes attributes of modules and configs, so that changes can be undone and made again."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


_UNSET: Any = object()


@dataclass(frozen=True)
class Computed:
    """A new value that is computed from the old value each time a change is made. It is not stored, as it may
    take gigabytes.

    Args:
        compute (`Callable`): returns the new value, given the old value.
    """

    compute: Callable[[Any], Any]


@dataclass(frozen=True)
class _Change:
    """A new value of one attribute.

    Args:
        owner (`weakref.ref`): the module or config with the attribute.
        name (`str`): the name of the attribute.
        value: the new value, or [`Computed`].
    """

    owner: "weakref.ref[Any]"
    name: str
    value: Any

    def make(self) -> Any:
        """Makes the change, and returns the old value."""
        owner = self.owner()
        if isinstance(self.value, Computed):  # a parameter or a module
            old = getattr(owner, self.name)
            setattr(owner, self.name, self.value.compute(old))
            return old
        old = vars(owner).get(self.name, _UNSET)
        vars(owner)[self.name] = self.value
        return old

    def take_back(self, old: Any) -> None:
        """Undoes the change. `old` is the value that [`make`] returned."""
        owner = self.owner()
        if isinstance(self.value, Computed):
            setattr(owner, self.name, old)
        elif old is _UNSET:
            vars(owner).pop(self.name, None)
        else:
            vars(owner)[self.name] = old


class Edits:
    """Changes attributes, and can undo the changes and make them again. Undone changes hold no strong
    reference to a module or tensor.
    """

    def __init__(self) -> None:
        self.renumbered: list[int] = []  # layers whose index was not their position before
        self._changes: list[_Change] = []
        self._old: list[Any] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of a module or a config."""
        change = _Change(weakref.ref(owner), name, value)
        self._old.append(change.make())
        self._changes.append(change)

    def undo(self) -> None:
        """Undoes all changes."""
        while self._old:
            self._changes[len(self._old) - 1].take_back(self._old.pop())

    def make(self) -> None:
        """Makes all changes again. If an error or interrupt occurs, it makes none."""
        try:
            for change in self._changes:
                self._old.append(change.make())
        except BaseException:
            self.undo()
            raise

    def forget_old(self) -> None:
        """Makes the changes permanent, so that the old values can be freed."""
        self._old.clear()
