"""Functions of another library that give way to others, wherever they have been imported."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class ReplacedFunctions:
    """Functions of modules that were replaced, and can be put back."""

    def __init__(self) -> None:
        self._own: list[tuple[ModuleType, str, Any]] = []

    def replace(self, module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
        """Replaces a function of a module, also in the modules that have imported it from there."""
        self._own.append((module, name, _exchange(module, name, replacement)))

    def restore(self) -> None:
        """Puts all functions back, also in modules that have imported a replacement since."""
        while self._own:
            _exchange(*self._own.pop())

    def __bool__(self) -> bool:
        return bool(self._own)


def _exchange(module: ModuleType, name: str, new: Any) -> Any:
    """Gives modules another object of a name, and returns the one that they had."""
    old = getattr(module, name)
    setattr(module, name, new)
    if old is not None:  # a library without an optional function has None in its place
        for path, other in list(sys.modules.items()):
            names = getattr(other, "__dict__", {})
            if names.get(name) is old and path.partition(".")[0] != "rope_ext":
                names[name] = new
    return old
