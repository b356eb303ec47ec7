"""The keywords of a rotation, and the orders of dimensions that the functions take."""

from typing import Any, Literal

from torch import Tensor

from rope_ext._argument_errors import describe

Layout = Literal["bshd", "bhsd", "sbhd", "thd"]

# The number of dimensions, and those to swap to get [B, S, H, D] or [T, H, D].
ORDERS: dict[str, tuple[int, tuple[int, int] | None]] = {
    "bshd": (4, None),
    "bhsd": (4, (1, 2)),
    "sbhd": (4, (0, 1)),
    "thd": (3, None),
}
# For caches, the dimensions to swap to get [blocks, block_size, Hk, D].
CACHE_ORDERS: dict[str, tuple[int, tuple[int, int] | None]] = {"NHD": (4, None), "HND": (4, (1, 2))}


def rotation_options(
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
) -> dict[str, Any]:
    """The keywords for an operator, without those that have their defaults: boxing a keyword takes
    half a microsecond.
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


def norm_options(eps: float, unit_offset: bool) -> dict[str, Any]:
    """The keywords of RMSNorm, likewise."""
    options: dict[str, Any] = {}
    if eps != 1e-6:
        options["eps"] = eps
    if unit_offset:
        options["unit_offset"] = unit_offset
    return options


def check_order_stays(function: str, options: dict[str, Any], inplace: object = True) -> None:
    """Raises if an in-place rotation would change the order of the pairs. The operators raise too,
    but a graph rotates out of place, so its operators would not.
    """
    if inplace is not True:
        raise TypeError(
            f"rope_ext.{function}: expected inplace to be a bool, got {describe(inplace)}"
        )
    order, interleaved = options.get("interleaved_out"), options.get("interleaved", False)
    if order is not None and order != interleaved:
        raise RuntimeError(
            f"rope_ext.{function}: expected interleaved_out to be None or interleaved, "
            f"{interleaved}, when inplace=True, as a rotation in place leaves the pairs where they "
            f"are, got {order}"
        )


def as_bshd(x: Tensor, layout: str, function: str, name: str = "x") -> Tensor:
    """A view of x as [B, S, H, D] or [T, H, D]; `function` and `name` are for messages."""
    if layout not in ORDERS:
        raise ValueError(
            f"rope_ext.{function}: expected layout to be one of {', '.join(ORDERS)}, got {layout!r}"
        )
    rank, swap = ORDERS[layout]
    if x.dim() != rank:
        dims = ", ".join(layout.upper())
        advice = ': packed tokens [T, H, D] take layout="thd"' if x.dim() == 3 else ""
        raise ValueError(
            f"rope_ext.{function}: expected {name} to have shape [{dims}] (layout {layout!r}), "
            f"got {list(x.shape)}{advice}"
        )
    return x if swap is None else x.transpose(swap[0], swap[1])


def from_bshd(x: Tensor, layout: str) -> Tensor:
    """A view of x [B, S, H, D] or [T, H, D] in the order of layout."""
    swap = ORDERS[layout][1]
    return x if swap is None else x.transpose(swap[0], swap[1])
