"""Tensors whose values differ from their memory: lazily negated views, and zeros without memory.

The operator gets a copy, as PyTorch's own operators do. If such a tensor is written, an error is
raised: PyTorch would copy a result back, but operators of rope_ext that write return none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rope_ext._engine.record import Operator
from rope_ext._torch_private import is_zero_tensor, keys_after

_LIBRARY = torch.library.Library("rope", "IMPL")

# dispatch key -> test, words for the message, method that makes a plain tensor
_OTHER_VALUES: dict[str, tuple[Callable[[Tensor], bool], str, str]] = {
    "Negative": (Tensor.is_neg, "view that negates its elements (z.conj().imag)", "resolve_neg"),
    "ZeroTensor": (is_zero_tensor, "tensor of zeros without memory", "clone"),
}


def register_negative_and_zero_tensors(operators: Sequence[Operator]) -> None:
    for operator in operators:
        for key in _OTHER_VALUES:
            _LIBRARY.impl(operator.name, _copying_kernel(operator, key), key, with_keyset=True)


def _copying_kernel(operator: Operator, key: str) -> Callable[..., Any]:
    is_other, expected, plain = _OTHER_VALUES[key]
    after = keys_after(key)

    def copied(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) and is_other(x) else x

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        for name, x in operator.named(args, options).items():
            if name in operator.written and x is not None and is_other(x):
                raise RuntimeError(
                    f"{operator.op}: expected {name}, which is written, to be no {expected}, got "
                    f"one: pass {name}.{plain}(), a copy"
                )
        options = {name: copied(x) for name, x in options.items()}
        return operator.overload.redispatch(keyset & after, *map(copied, args), **options)

    return kernel
