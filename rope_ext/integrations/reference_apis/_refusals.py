"""The errors of these functions: function, argument, expected, got."""

from typing import Any, NoReturn

from torch import Tensor


def refuse(function: str, argument: str, expected: str, got: Any) -> NoReturn:
    if isinstance(got, Tensor):
        got = f"shape {list(got.shape)}"
    raise ValueError(f"rope_ext {function}: expected {argument} {expected}, got {got}")
