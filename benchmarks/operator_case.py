"""A GPU case: an operator at one shape, the bytes that it has to move, its exact result, and other
ways to the same result.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import Case
from torch import Tensor

SECTOR = 32  # bytes: the least that memory moves
POSITION_BYTES = 8  # of an int64 position or slot
TABLE_BYTES = 4  # of a float32 cos or sin
EAGER = "eager PyTorch"  # the name of a way that each case has
FUNCTION = "rope_ext.apply_rotary_qk"  # a way: what Python users call, past the dispatcher

Arguments = dict[str, Any]
Call = Callable[[], tuple[Tensor, ...] | Tensor | None]


@dataclass(frozen=True)
class Way:
    """A function of the tensors that `prepare` makes from the operator's arguments. Only the
    function is timed.

    It returns the operator's results, or the written tensors in the order of the schema. It returns
    None if it has written into the arguments.
    """

    function: Callable[..., Any]
    prepare: Callable[[Arguments], Arguments] = dict
    bind: Callable[[Callable[..., Any], Arguments], Call] = lambda f, a: functools.partial(f, **a)
    angle_roundings: int = 0  # roundings of an angle to float32: the error grows with the position

    def call(self, arguments: Arguments) -> Call:
        return self.bind(self.function, self.prepare(arguments))

    def compiled(self) -> "Way":
        torch.compiler.reset()  # each case is compiled for its own shape
        return replace(self, function=torch.compile(self.function, dynamic=False))


@dataclass(frozen=True)
class OperatorCase:
    operator: Any  # an overload of torch.ops.rope
    form: str
    shape: Case
    arguments: Callable[[], Arguments]  # new tensors by the names of the schema, tables shared
    exact: Callable[[Arguments], tuple[Tensor, ...]]  # the results, in float64
    least_bytes: int  # read and written
    ways: dict[str, Way] = field(default_factory=dict)
    compiled: bool = False  # EAGER is timed under torch.compile too
    roundings: int = 4  # intermediate float32 roundings, of numbers up to the largest

    @property
    def name(self) -> str:
        return f"{operator_name(self.operator)} {self.form}"

    @property
    def shape_name(self) -> str:
        """prefill or decode."""
        return self.shape.step

    @property
    def tokens(self) -> int:
        return self.shape.tokens

    @property
    def label(self) -> str:
        return f"{self.name}, {self.shape_name} {self.tokens}"

    def make(self, count: int) -> list[Call]:
        """Calls of the operator, each on its own tensors."""
        return [self.call(self.arguments()) for _ in range(count)]

    def call(self, arguments: Arguments) -> Call:
        options = dict(arguments)
        names = [a.name for a in self.operator._schema.arguments if not a.kwarg_only]
        positional = [options.pop(name, None) for name in names]
        return functools.partial(self.operator, *positional, **options)

    def results(self, arguments: Arguments, returned: Any) -> tuple[Tensor, ...]:
        """The results of a call, or the tensors that it has written."""
        if returned is None:
            return tuple(arguments[name] for name in self.written)
        return returned if isinstance(returned, tuple) else (returned,)

    @property
    def written(self) -> list[str]:
        """Without those that may be absent."""
        schema = self.operator._schema.arguments
        return [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write
                and not a.has_default_value()]  # fmt: skip

    @property
    def result_names(self) -> list[str]:
        return self.written or [f"result {i}" for i in range(len(self.operator._schema.returns))]


def operator_name(operator: Any) -> str:
    """The name in torch.ops.rope: apply_rotary, apply_rotary.out."""
    return operator._schema.name.removeprefix("rope::") + (
        f".{operator._schema.overload_name}" if operator._schema.overload_name else ""
    )


def in_sectors(byte_count: int) -> int:
    return -(-byte_count // SECTOR) * SECTOR


def in_float64(arguments: Arguments) -> Arguments:
    """A copy in float64; integers and float8 stay as they are."""
    return {
        name: value.double()
        if isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1
        else value
        for name, value in arguments.items()
    }
