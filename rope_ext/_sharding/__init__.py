"""The operators on DTensors. The import of torch.distributed.tensor, which takes long, brings the
rules along, whoever asks for it and whenever.

plan.py   how each operand has to be placed, and what the rank then has of it
rules.py  a rule for each operator
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODULE = "torch.distributed.tensor"


def register() -> None:
    """Registers the rules: now if there can be a DTensor already, or with the import of DTensor."""
    if _MODULE in sys.modules:
        _register_rules()
    else:
        sys.meta_path.insert(0, _Importing())


def _register_rules() -> None:
    from rope_ext._sharding import rules

    rules.register()


class _Importing:
    """Finds torch.distributed.tensor as ever, and registers the rules once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register_rules()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
