"""Calls of operators that write to a cache, with arguments in a dictionary, and their results."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support import assert_same_bits


@dataclass(frozen=True)
class Appending:
    """operator: returns nothing. reference: the same in plain PyTorch; it returns what the tensors
    in `written` become.
    """

    operator: torch._ops.OpOverloadPacket
    reference: Callable[..., tuple[torch.Tensor, ...]]
    written: tuple[str, ...]

    def expected_of(self, arguments):
        """What the written tensors become."""
        on_host = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        return dict(zip(self.written, self.reference(**on_host), strict=True))

    def append(self, arguments, function=None):
        """Calls the operator, or a function with its parameters."""
        options = dict(arguments)
        schema = self.operator.default._schema
        names = [a.name for a in schema.arguments if not a.kwarg_only]
        positional = [options.pop(name) for name in names if name in options]
        assert (function or self.operator)(*positional, **options) is None

    def assert_appends(self, arguments, **options):
        """The bits are those of the steps in plain PyTorch, and other tensors do not change."""
        kept = {name: t.clone() for name, t in arguments.items() if name not in self.written}
        expected = self.expected_of({**arguments, **options})
        self.append({**arguments, **options})
        for name, t in {**kept, **expected}.items():
            assert_same_bits(arguments[name], t)
