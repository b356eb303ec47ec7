"""The orders of dimensions that the functions take, as views of the one that the operators take."""

from typing import Literal

from torch import Tensor

Layout = Literal["bshd", "bhsd", "sbhd", "thd"]

# The dimensions to swap to get [B, S, H, D]; packed [T, H, D] stays as it is.
_SWAP: dict[str, tuple[int, int] | None] = {
    "bshd": None,
    "bhsd": (1, 2),
    "sbhd": (0, 1),
    "thd": None,
}


def as_bshd(x: Tensor, layout: str, function: str, name: str = "x") -> Tensor:
    """A view of x [B, S, H, D] or [T, H, D]; `function` and `name` are for refusals."""
    if layout == "bshd" and x.dim() == 4:
        return x
    if layout not in _SWAP:
        raise ValueError(
            f"rope_ext.{function}: expected layout to be one of {', '.join(_SWAP)}, got {layout!r}"
        )
    rank = 3 if layout == "thd" else 4
    if x.dim() != rank:
        dims = ", ".join(layout.upper())
        advice = ': packed tokens [T, H, D] take layout="thd"' if x.dim() == 3 else ""
        raise ValueError(
            f"rope_ext.{function}: expected {name} to have shape [{dims}] (layout {layout!r}), "
            f"got {list(x.shape)}{advice}"
        )
    swap = _SWAP[layout]
    return x if swap is None else x.transpose(*swap)


def from_bshd(x: Tensor, layout: str) -> Tensor:
    swap = _SWAP[layout]
    return x if swap is None else x.transpose(*swap)
