"""Checks of the functions of this package, and the formula of the exponents."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from rope_ext._argument_errors import shown

Device = torch.device | str | None

LAST_POSITION = 2**31 - 1  # of cos_sin, and the longest context in tokens
MOST_CHANNELS = 65_536  # of a head: 128 times the widest known
# The largest magnitude; 1 / LARGEST is the smallest above 0. float32 holds products of two.
LARGEST = 1e15


def refuse(function: str, name: str, expected: str, value: Any) -> NoReturn:
    """Raises the ValueError of this package for a wrong value."""
    message = f"expected {name} to be {expected}, got {shown(value)}"
    raise ValueError(f"frequencies.{function}: {message}")


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
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and -math.inf < value < math.inf
    if (
        not number
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        bounds = [
            f"{words} {bound:g}"
            for words, bound in (("at least", least), ("above", above), ("at most", most))
            if bound is not None
        ]
        kind = "" if number else "a finite number "
        refuse(function, name, (kind + " and ".join(bounds)).strip(), value)
    if value != 0 and not 1 / LARGEST <= abs(value) <= LARGEST:
        refuse(function, name, f"of a size from {1 / LARGEST:g} to {LARGEST:g}", value)


def check_integer(
    function: str, name: str, value: Any, *, least: int = 1, most: int = LAST_POSITION
) -> None:
    """Raises unless the value is an integer within the bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        refuse(function, name, f"an integer of at least {least} and at most {most}", value)


def check_rotary_dim(
    function: str, head_dim: int, rotary_dim: int | None, *, least: int = 2, divisor: int = 2
) -> int:
    """R: rotary_dim, or head_dim if rotary_dim is None."""
    if rotary_dim is None:
        name, value, most, of = "head_dim", head_dim, MOST_CHANNELS, ""
    else:
        check_integer(function, "head_dim", head_dim, most=MOST_CHANNELS)
        name, value, most, of = "rotary_dim", rotary_dim, head_dim, "head_dim "
    if not isinstance(value, int) or not least <= value <= most or value % divisor:
        kind = "even" if divisor == 2 else f"a multiple of {divisor}"
        refuse(function, name, f"{kind}, at least {least} and at most {of}{most}", value)
    return value


def check_factors(function: str, name: str, values: Sequence[float], pairs: int) -> None:
    """Raises unless the value is a list of `pairs` positive numbers."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        refuse(function, name, f"a list of {pairs} numbers", values)
    if len(values) != pairs:
        raise ValueError(
            f"frequencies.{function}: expected {name} to have {pairs} numbers, one a pair of "
            f"channels, got {len(values)}"
        )
    for i, value in enumerate(values):
        check_number(function, f"{name}[{i}]", value, above=0)


def exponents(channels: int, device: Device, of: int | None = None) -> Tensor:
    """2 i / of for each pair i of the channels, float32 [channels / 2]. of=None: of channels."""
    return torch.arange(0, channels, 2, dtype=torch.int64, device=device).float() / (of or channels)
