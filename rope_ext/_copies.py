"""Tensors whose values are not those in memory, as arguments of the operators.

PyTorch's own way is to copy them, and to copy back to one that is written from the result of the
operator. Those that write have no result, so there a tensor that is written is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rope_ext._calling import name_of

# How to tell, what they are, what gives a plain one.
_OTHER_VALUES: dict[str, tuple[Callable[[Tensor], bool], str, str]] = {
    "Negative": (Tensor.is_neg, "view that negates its elements (z.conj().imag)", "resolve_neg"),
    "ZeroTensor": (Tensor._is_zerotensor, "tensor of zeros without memory", "clone"),
}


def register_copies(library: torch.library.Library, name: str, overload: Any) -> None:
    for key in _OTHER_VALUES:
        library.impl(name, _copying_kernel(overload, key), key, with_keyset=True)


class Arguments:
    """Which arguments an operator has, and which of them it writes."""

    def __init__(self, overload: Any) -> None:
        self.op = name_of(overload)
        arguments = overload._schema.arguments
        self.names = [a.name for a in arguments if not a.kwarg_only]
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        self.places = [i for i, name in enumerate(self.names) if name in written]
        self.outs = [a.name for a in arguments if a.kwarg_only and a.name in written]

    def written(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
        return (*(args[i] for i in self.places), *(options[name] for name in self.outs))

    def named(self, args: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[str, Tensor]]:
        given = *zip(self.names, args, strict=False), *options.items()  # the last may be left out
        return [(name, x) for name, x in given if isinstance(x, Tensor)]


def _copying_kernel(overload: Any, key: str) -> Callable[..., Any]:
    arguments = Arguments(overload)
    is_other, expected, plain = _OTHER_VALUES[key]
    after = torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, key))

    def copied(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) and is_other(x) else x

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        written = {id(x) for x in arguments.written(args, options)}
        for name, x in arguments.named(args, options):
            if id(x) in written and is_other(x):
                raise RuntimeError(
                    f"{arguments.op}: expected {name}, which is written, to be no {expected}, got "
                    f"one: pass {name}.{plain}(), a copy"
                )
        options = {name: copied(x) for name, x in options.items()}
        return overload.redispatch(keyset & after, *map(copied, args), **options)

    return kernel
