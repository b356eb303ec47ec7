"""LitGPT's rotations.

Call :func:`patch` once::

    from rope_ext.integrations import litgpt

    litgpt.patch()

Source: LitGPT 0.5.13, ``litgpt/model.py``.
"""

import re
from importlib.metadata import version

from torch import Tensor

from rope_ext.integrations._replaced_functions import ReplacedFunctions
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary

KNOWN_RELEASE = "0.5"

_replaced = ReplacedFunctions()


def patch() -> None:
    """Gives all models of LitGPT these rotations, also those that exist.

    Replaces ``apply_rope`` and ``apply_rope_interleave`` of ``litgpt.model``, also in modules that
    have imported them. A second call changes nothing.

    Raises:
        ImportError: without LitGPT.
        RuntimeError: for a release that this was not tested with. Nothing has been changed then.
    """
    import litgpt.model

    release = version("litgpt")
    if ".".join(re.findall(r"\d+", release)[:2]) != KNOWN_RELEASE:
        raise RuntimeError(
            f"rope_ext.integrations.litgpt.patch: expected litgpt {KNOWN_RELEASE}, got {release}: "
            "install a release that was tested"
        )
    if not _replaced:
        for function in (apply_rope, apply_rope_interleave):
            _replaced.replace(litgpt.model, function.__name__, function)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _replaced.restore()


@names_arguments
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of x, as ``litgpt.model.apply_rope``.

    Args:
        x: [B, ..., T, R], R even.
        cos, sin: [B, T, R] or [1, T, R], one angle for each channel.

    Returns:
        The rotated x, of its shape and dtype.

    Raises:
        ValueError: for wrong shapes.

    Differs from LitGPT: arithmetic is in float32 (float64 for float64) and rounded once.
    """
    return _rotated("litgpt.apply_rope", x, cos, sin)


@names_arguments
def apply_rope_interleave(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of neighbours of x, which become halves, as
    ``litgpt.model.apply_rope_interleave``.

    Arguments, result and errors are those of :func:`apply_rope`.
    """
    order = {"interleaved": True, "interleaved_out": False}
    return _rotated("litgpt.apply_rope_interleave", x, cos, sin, **order)


def _rotated(function: str, x: Tensor, cos: Tensor, sin: Tensor, **order: bool) -> Tensor:
    if x.dim() < 3 or x.shape[-1] % 2 != 0:
        refuse(function, "x", "to have shape [B, ..., T, R] with an even R", x)
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.dim() != 3 or table.shape[1:] != x.shape[-2:] or table.shape[0] not in (1, len(x)):
            expected = f"to have shape [1, {x.shape[-2]}, {x.shape[-1]}], or [{len(x)}, ...]"
            refuse(function, name, expected, table)
    if cos.stride(-1) != 1:  # a layer's part of the tables of a model with several bases
        cos, sin = cos.contiguous(), sin.contiguous()
    heads = x.unsqueeze(1).flatten(1, -3)  # [B, H, T, R]
    rotated = apply_rotary(heads, cos, sin, rotary_dim=x.shape[-1], layout="bhsd", **order)
    return rotated.reshape(x.shape)
