"""The rotation of timm's vision transformers, by the operators.

All models of timm that rotate by ``apply_rot_embed_cat`` (EVA-02, DINOv3, ViT with RoPE, NaFlexViT
and others) end in one function, ``apply_rot_embed`` of ``timm/layers/pos_embed_sincos.py``.
:func:`patch` replaces it, for all models of the process::

    import timm
    from rope_ext.integrations.timm import patch

    patch()
    model = timm.create_model("vit_base_patch16_dinov3")

Source: timm 1.0.31.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from rope_ext.integrations.patching.pairs import adjacent
from rope_ext.integrations.patching.probes import Numbers
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary

TESTED = "1.0.31"
_NAME = "apply_rot_embed"
_FUNCTION = f"timm.{_NAME}"


@names_arguments
def apply_rot_embed(x: Tensor, sin_emb: Tensor, cos_emb: Tensor, half: bool = False) -> Tensor:
    """Rotates x, as ``timm.layers.apply_rot_embed``.

    Args:
        x: [S, D], [H, S, D] or [B, H, S, D], such as queries without their prefix tokens; of the
            four dtypes of the operators.
        sin_emb: [S, D], one angle a channel; or with its own rows for each head or image,
            [1|H, S, D] or [1|B, 1|H, S, D]. Any of the four dtypes.
        cos_emb: as sin_emb.
        half: pairs are channels (i, i + D / 2) instead of neighbours.

    Returns:
        The rotated x, of its shape and dtype. Differentiable for x, sin_emb and cos_emb, twice.

    Raises:
        ValueError: for other shapes, some of which timm would broadcast.

    Differs from timm: computes in float32 (float64 for float64) and rounds once, where timm rounds
    each product if the tables have x's dtype. With float32 tables the bits are timm's. Copies x
    only if its channels are not adjacent, or if there are rows for each image and each head.
    """
    _check(x, sin_emb, cos_emb)
    whole, cos, sin = (adjacent(t)[(None,) * (4 - t.dim())] for t in (x, cos_emb, sin_emb))
    rotate = functools.partial(apply_rotary, rotary_dim=x.shape[-1], interleaved=not half)
    batch, heads = cos.shape[:2]  # 1 or B, 1 or H
    if heads == 1:
        rotated = rotate(whole, cos[:, 0], sin[:, 0], layout="bhsd")
    elif batch == 1:  # The operators' rows differ by batch: heads become the batch, images heads.
        rotated = rotate(whole.permute(1, 2, 0, 3), cos[0], sin[0]).permute(2, 0, 1, 3)
    else:
        cos, sin, tokens = (t.flatten(0, 1) for t in (cos, sin, whole))
        rotated = rotate(tokens.unsqueeze(2), cos, sin).view_as(whole)
    return rotated[(0,) * (4 - x.dim())]


def _check(x: Tensor, sin: Tensor, cos: Tensor) -> None:
    if not 2 <= x.dim() <= 4:
        refuse(_FUNCTION, "x", "to have shape [S, D], [H, S, D] or [B, H, S, D]", x)
    for name, table in (("sin_emb", sin), ("cos_emb", cos)):
        lead = zip(table.shape[-3::-1], x.shape[-3::-1], strict=False)
        fits = 2 <= table.dim() <= x.dim() and table.shape[-2:] == x.shape[-2:]
        if not fits or any(rows not in (1, size) for rows, size in lead):
            expected = f"to have shape [S, D], [1|H, S, D] or [1|B, 1|H, S, D] of x {list(x.shape)}"
            refuse(_FUNCTION, name, expected, table)
    if sin.shape != cos.shape:
        refuse(_FUNCTION, "cos_emb", f"to have the shape of sin_emb, {list(sin.shape)}", cos)


def patch() -> None:
    """Replaces timm's ``apply_rot_embed`` by the operators, for all models of this process.

    Models that exist already rotate by the operators too, and compiled ones compile again. What
    torch.fx traces keeps timm's own arithmetic; torch.jit.script raises an error.

    Raises:
        ImportError: without timm.
        RuntimeError: for a timm whose function is not called by apply_rot_embed_cat or computes
            anything else than that of timm 1.0.31. Nothing has been changed then.
    """
    own = _own()
    if not hasattr(own, "_rope_ext_own"):
        _check_is_known(own)
        _exchange(own, _replacement(own))


def unpatch() -> None:
    """Undoes :func:`patch`."""
    replaced = _own()
    if hasattr(replaced, "_rope_ext_own"):
        _exchange(replaced, replaced._rope_ext_own)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """timm patched within a ``with`` block, and as before after it."""
    before = hasattr(_own(), "_rope_ext_own")
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()


def _own() -> Any:
    """The function that timm rotates with now."""
    from timm.layers import pos_embed_sincos

    return getattr(pos_embed_sincos, _NAME, None)


def _exchange(before: Callable[..., Tensor], now: Callable[..., Tensor]) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "timm" and vars(module).get(_NAME) is before:
            setattr(module, _NAME, now)


def _replacement(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rotate(x: Tensor, sin_emb: Tensor, cos_emb: Tensor, half: bool = False) -> Tensor:
        rotates = own if isinstance(x, fx.Proxy) else apply_rot_embed
        return rotates(x, sin_emb, cos_emb, half)

    refusal = "expected timm as it is, got it patched by rope_ext: unpatch()"
    vars(rotate).update(_rope_ext_own=own, __script_unsupported=refusal)  # of torch.jit.script
    return rotate


def _check_is_known(own: Any) -> None:
    import timm
    from timm.layers import apply_rot_embed_cat

    numbers = Numbers(torch.float32)
    shapes = [(5, 16), (3, 5, 16), (2, 1, 5, 16), (2, 3, 5, 16)]
    probes = [[numbers(2, 3, 5, 16), numbers(*shape), numbers(*shape)] for shape in shapes]
    if (
        own is None
        or _NAME not in apply_rot_embed_cat.__code__.co_names
        or [*inspect.signature(own).parameters] != [*inspect.signature(apply_rot_embed).parameters]
        or not all(
            torch.allclose(own(*probe, half), apply_rot_embed(*probe, half), atol=1e-5)
            for probe in probes
            for half in (False, True)
        )
    ):
        raise RuntimeError(
            f"rope_ext timm.patch: expected a timm whose apply_rot_embed_cat calls {_NAME}(x, "
            f"sin_emb, cos_emb, half) and rotates as timm {TESTED}, got timm {timm.__version__}, "
            "which does something else; nothing has been changed"
        )
