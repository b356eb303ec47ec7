"""The options of the rotation, as its operators are called with them."""

from typing import Any


def rotation_options(
    rotary_dim: int | None,
    rotary_offset: int,
    interleaved: bool,
    interleaved_out: bool | None,
    inverse: bool,
) -> dict[str, Any]:
    """What an operator has to be told: each option that it is called with takes it half a
    microsecond, so those that have their defaults are left out.
    """
    options: dict[str, Any] = {}
    if rotary_dim is not None:
        options["rotary_dim"] = rotary_dim
    if rotary_offset != 0:
        options["rotary_offset"] = rotary_offset
    if interleaved:
        options["interleaved"] = interleaved
    if interleaved_out is not None:
        options["interleaved_out"] = interleaved_out
    if inverse:
        options["inverse"] = inverse
    return options
