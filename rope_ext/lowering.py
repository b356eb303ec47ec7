"""What the functions become in a graph of a compiler: an operator, or plain PyTorch."""

from types import TracebackType
from typing import Literal

import torch

Lowering = Literal["op", "decompose"]

_decomposes = False


class lowering:
    """What rope_ext's functions become in a graph of torch.compile or torch.export.

    "op", the default: the operator, which runs as it does without a compiler; the compiler knows
    only what it reads and writes. "decompose": plain PyTorch, which Inductor fuses with what comes
    before and after it.

    A call sets the choice from now on; in a ``with`` statement it is set until the end of the
    block. The choice applies to all threads, and to the rotations of the functions and modules of
    rope_ext, forward and backward. Calls of ``torch.ops.rope`` stay operators, as do the tables of
    cos and sin and the rotation by angles, which need an exact reduction of the angles. When the
    choice changes, a graph is compiled again. Eager calls always run the operators.

    The numbers are the same, except that a compiler may contract a product and a sum to one
    rounding, as Triton does: both results are then within ``2^-23 (|x1 cos| + |x2 sin|)`` and one
    rounding of the exact value. Inductor's C++ contracts nothing, so on the CPU the bits are equal.
    Decomposed, a position outside of the table gives NaN, on every device.

    Args:
        to: "op" or "decompose".

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, to: Lowering) -> None:
        global _decomposes
        if to not in ("op", "decompose"):
            raise ValueError(f"rope_ext.lowering: expected 'op' or 'decompose', got {to!r}")
        self.before = _decomposes
        _decomposes = to == "decompose"

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _decomposes
        _decomposes = self.before


def decomposes() -> bool:
    """Whether a graph is being traced that gets the decompositions."""
    return _decomposes and torch.compiler.is_compiling()
