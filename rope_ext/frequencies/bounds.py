"""What the functions of this package check, and the formula that they share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Device = torch.device | str | None


def check_number(
    function: str,
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Refuses what is not a finite number within the bounds, which are in the message."""
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (("at least", least), ("above", above), ("at most", most))
        if bound is not None
    ]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and -math.inf < value < math.inf
    if (
        not number
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        kind = "" if number else "a finite number "
        raise ValueError(
            f"frequencies.{function}: expected {name} to be {kind}{' and '.join(bounds)}, "
            f"got {value!r}"
        )


def check_length(function: str, name: str, value: Any, least: int = 1) -> None:
    """Refuses what is not a number of tokens of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"frequencies.{function}: expected {name} to be an integer of at least {least} "
            f"(tokens), got {value!r}"
        )


def check_rotary_dim(
    function: str, head_dim: int, rotary_dim: int | None, *, least: int = 2, divisor: int = 2
) -> int:
    """R: rotary_dim, or head_dim where it is None."""
    name, value, most = (
        ("head_dim", head_dim, "")
        if rotary_dim is None
        else ("rotary_dim", rotary_dim, f" and at most head_dim {head_dim}")
    )
    if (
        not isinstance(head_dim, int)
        or not isinstance(value, int)
        or value < least
        or value % divisor
        or value > head_dim
    ):
        kind = "even" if divisor == 2 else f"a multiple of {divisor}"
        raise ValueError(
            f"frequencies.{function}: expected {name} to be {kind}, at least {least}{most}, "
            f"got {value!r}"
        )
    return value


def check_factors(function: str, name: str, values: Sequence[float], pairs: int) -> None:
    """Refuses what is not a list of `pairs` positive numbers."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(
            f"frequencies.{function}: expected {name} to be a list of {pairs} numbers, "
            f"got {type(values).__name__}"
        )
    if len(values) != pairs:
        raise ValueError(
            f"frequencies.{function}: expected {name} to have {pairs} numbers, one a pair of "
            f"channels, got {len(values)}"
        )
    for i, value in enumerate(values):
        check_number(function, f"{name}[{i}]", value, above=0)


def exponents(channels: int, device: Device, of: int | None = None) -> Tensor:
    """2 i / of for each pair i of the channels, float32 [channels / 2]. of=None: of them all."""
    return torch.arange(0, channels, 2, dtype=torch.int64, device=device).float() / (of or channels)
