"""Delays a registration with a module of PyTorch, which is slow to import, until it is imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(module: str, register: Callable[[], None]) -> None:
    """Calls register as soon as the module is imported: now, if it has been."""
    if module in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Importing(module, register))


class _Importing:
    """An import finder: leaves the module to the next finders, and registers after its import."""

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module, self.register = module, register

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            self.register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
