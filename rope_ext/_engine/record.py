"""The record of an operator: what its schema does not say, and properties that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rope_ext._engine.sharding import ShardingRule
from rope_ext._torch_private import is_tensor, name_of, schema_of

Given = dict[str, Any]  # every argument of a call by its name
Grads = tuple[Tensor | None, ...]
# (operator, number of samples, batched dimension of each argument, arguments)
# -> results, their batched dimensions
VmapRule = Callable[["Operator", int, dict[str, int | None], Given], tuple[Any, Any]]


class Derivative(NamedTuple):
    """How an operator is differentiated, backward and forward."""

    save: Callable[[Any, list[Any]], None]  # (ctx, positional arguments)
    backward: Callable[..., Grads]  # (ctx, *gradients of results) -> one per positional argument
    tangent: Callable[[list[Any], Grads, Given], Any]  # (arguments, tangents, options)


class Composed(NamedTuple):
    """The operator written as differentiable functions, which are called to differentiate it."""

    function: Callable[..., Any]  # takes the operator's arguments, all by name


@dataclass(frozen=True, eq=False)
class Operator:
    """One overload of an operator of torch.ops.rope.

    name           "apply_rotary", "apply_rotary.out"
    rotates        the tensors that rotate, [B, S, H, D] or [T, H, D]
    pairs          the tensor whose last dimension counts pairs (or channels, with rotary_dim)
    results        the tensors that results are like, or a function that makes fakes; None: rotates
    derivative     None for operators that write, which raise for tensors that require grad
    flops_rotated  operations for each channel that rotates
    flops_channel  further operations for each channel of the tensors that rotate
    rotated        how many channels rotate, from the shapes of a call; None: those of rotates
    vmap           None: by_sequences of vmap.py
    sharding       None: rotation_sharding of sharding.py
    """

    name: str
    rotates: tuple[str, ...] = ()
    pairs: str = "cos"
    results: tuple[str, ...] | Callable[[Given], tuple[Tensor, ...]] | None = None
    derivative: Derivative | Composed | None = None
    flops_rotated: int = 3
    flops_channel: int = 0
    rotated: Callable[[Given], int] | None = None
    vmap: VmapRule | None = None
    sharding: ShardingRule | None = None

    @cached_property
    def overload(self) -> Any:
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.rope, packet), overload or "default")

    @cached_property
    def functional(self) -> Any:
        """The overload that returns what this one writes in place."""
        return getattr(torch.ops.rope, self.name.removesuffix("_")).default

    @cached_property
    def op(self) -> str:
        """The name in messages, rope::apply_rotary."""
        return name_of(self.overload)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(schema_of(self.overload).arguments)

    @cached_property
    def positional(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.arguments if not a.kwarg_only)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.arguments if is_tensor(a))

    @cached_property
    def written(self) -> tuple[str, ...]:
        written = (a for a in self.arguments if a.alias_info is not None and a.alias_info.is_write)
        return tuple(a.name for a in written)

    @cached_property
    def outs(self) -> tuple[str, ...]:
        """The keyword arguments that receive the results: they are always given."""
        return tuple(
            a.name for a in self.arguments
            if a.name in self.written and a.kwarg_only and not a.has_default_value()
        )  # fmt: skip

    @cached_property
    def defaults(self) -> Given:
        return {a.name: a.default_value for a in self.arguments}

    @cached_property
    def result_count(self) -> int:
        return len(schema_of(self.overload).returns)

    @cached_property
    def leading(self) -> str:
        """The tensor whose device the others must have."""
        return self.rotates[0] if self.rotates else self.pairs

    def named(self, args: tuple[Any, ...], options: Given) -> Given:
        """The arguments of a call by name, without defaults, which the dispatcher omits."""
        return dict(zip(self.positional, args, strict=False)) | options

    def given(self, args: tuple[Any, ...], options: Given) -> Given:
        """All arguments of a call by name."""
        return self.defaults | self.named(args, options)

    @cached_property
    def written_tensors(self) -> Callable[[tuple[Any, ...], Given], tuple[Tensor, ...]]:
        """Picks the tensors that are written from the args and options of a call."""
        if self.written == self.positional[: len(self.written)]:
            count = len(self.written)
            return lambda args, options: args[:count]
        places = [i for i, name in enumerate(self.positional) if name in self.written]
        keywords = [name for name in self.written if name not in self.positional]

        def pick(args: tuple[Any, ...], options: Given) -> tuple[Tensor, ...]:
            given = (options.get(name) for name in keywords)
            return (*[args[i] for i in places], *[x for x in given if x is not None])

        return pick
