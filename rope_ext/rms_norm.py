"""RMSNorm and rotation of x, of q and k, or of a packed qkv, in one pass, as typed functions."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._argument_errors import raise_argument_error
from rope_ext._destinations import Rotation, rotate
from rope_ext._engine.direct import direct_call
from rope_ext._in_place import check_needs_no_grad
from rope_ext.options import Layout, PackedLayout, norm_options, rotation_options
from rope_ext.qkv import split_by

rope = torch.ops.rope


def rms_norm_rotary(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: Layout = "bshd",
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalises x by RMSNorm, then rotates it: one pass over memory (one launch on CUDA).

    For layers that have no k of their own, as those that share keys (Gemma 3n, Gemma 4).

    Args:
        x: as for :func:`rope_ext.apply_rotary`.
        weight: [D]: a row is a head; or [H, D]: a row is all heads of a token. Of x's dtype or
            float32.
        eps, unit_offset: as for :func:`rope_ext.rms_norm_rotary_qk`.
        cos, sin, position_ids, layout: as for :func:`rope_ext.apply_rotary`.
        rotary_dim, rotary_offset, interleaved, interleaved_out, inverse: as there.
        inplace: write into x and return it. Nothing may need a gradient, which takes x as it was.
            The pairs stay where they are: interleaved_out has to be None or interleaved.
        out: as for :func:`rope_ext.apply_rotary`.

    Returns:
        x normalised and rotated, of its shape and dtype.

    Differentiable, and exact, as :func:`rope_ext.rms_norm_rotary_qk`.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rope_ext.rms_norm_rotary_qk`.
    """
    if type(inplace) is bool and not is_dynamo_compiling():
        args = (
            layout, None, None, x, weight, cos, sin, position_ids, eps, unit_offset,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if out is None:
            rotated = (_normalise_in_place if inplace else _normalise)(*args)
            if rotated is not NotImplemented:
                return x if rotated is None else rotated
        elif not inplace and _normalise_into(*args, out) is None:
            return out
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        options |= norm_options(eps, unit_offset)
        outs = None if out is None else (out,)
        rows = weight, cos, sin, position_ids
        return rotate(_ONE, (x,), rows, options, layout, inplace, outs)
    except Exception:
        raise_argument_error(rms_norm_rotary)
        raise


def rms_norm_rotary_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: Layout = "bshd",
    inplace: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises q and k by RMSNorm, then rotates them: one pass over memory (one launch on CUDA).

    A row becomes ``x / sqrt(mean(x^2) + eps) * weight``, then its R channels at rotary_offset are
    rotated as by :func:`rope_ext.apply_rotary_qk`; the others stay normalised. Arithmetic is in
    float32 (float64 for float64), rounded to q's dtype once, at the end. For float16 and bfloat16,
    transformers also rounds after the norm and after each step of the rotation: its results differ
    from these by a few roundings, and are less exact.

    Args:
        q, k: as for :func:`rope_ext.apply_rotary_qk`.
        q_weight: [D]: a row is a head (Qwen3, Gemma 3); or [H, D]: a row is all heads of a token
            (OLMo 2, whose weight [H * D] is ``weight.view(H, D)``). Of q's dtype or float32.
        k_weight: [D], or [Hk, D] where q_weight is [H, D]; of q_weight's dtype.
        eps: added to the mean of the squares, at least 0.
        unit_offset: the factor is 1 + weight (Gemma).
        cos, sin, position_ids, layout: as for :func:`rope_ext.apply_rotary`.
        rotary_dim, rotary_offset, interleaved, interleaved_out, inverse: as there.
        inplace: write into q and k and return them, as for :func:`rope_ext.rms_norm_rotary`.
        out: as for :func:`rope_ext.apply_rotary_qk`.

    Returns:
        q and k normalised and rotated, of their shapes and dtype.

    Differentiable for q, k, q_weight, k_weight, cos and sin, any number of times. Kernels compute
    the gradients to q, k and the weights, deterministically for any number of threads. Those to a
    weight are summed in float32 (float64 for float64), in an order that depends on the shapes
    alone, and rounded once. Under ``torch.compile`` it stays an operator, also with
    ``rope_ext.lowering("decompose")``.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rope_ext.apply_rotary`. On CUDA a position
            outside of the table makes the rotated channels of its token NaN.

    Source: RMSNorm, arXiv 1910.07467, equation 4; Qwen3RMSNorm, Gemma3RMSNorm and Olmo2RMSNorm of
    transformers; RoFormer, arXiv 2104.09864, equation 34.
    """
    if type(inplace) is bool and not is_dynamo_compiling():
        args = (
            layout, None, None, q, k, q_weight, k_weight, cos, sin, position_ids, eps, unit_offset,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if out is None:
            rotated = (_normalise_in_place_qk if inplace else _normalise_qk)(*args)
            if rotated is not NotImplemented:
                return (q, k) if rotated is None else rotated
        elif (
            not inplace
            and type(out) is tuple
            and len(out) == 2
            and _normalise_into_qk(*args, *out) is None
        ):
            return out
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        options |= norm_options(eps, unit_offset)
        rows = q_weight, k_weight, cos, sin, position_ids
        return rotate(_BOTH, (q, k), rows, options, layout, inplace, out)
    except Exception:
        raise_argument_error(rms_norm_rotary_qk)
        raise


def rms_norm_rotary_qkv(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    kv_heads: int | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: PackedLayout = "bshd",
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the output of a projection into q, k and v, and normalises and rotates q and k.

    Args:
        qkv, kv_heads, layout: as for :func:`rope_ext.apply_rotary_qkv`.
        q_weight, k_weight: as for :func:`rms_norm_rotary_qk`; by group, [D].
        cos, sin, position_ids: as for :func:`rope_ext.apply_rotary`.
        eps, unit_offset: as for :func:`rms_norm_rotary_qk`.
        rotary_dim, rotary_offset, interleaved, interleaved_out, inverse: as there.

    Returns:
        q [B, S, Hq, D], k and v [B, S, Hk, D], dense.

    Differentiable, and exact, as :func:`rms_norm_rotary_qk`, with a backward of one pass as
    :func:`rope_ext.apply_rotary_qkv`.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rms_norm_rotary_qk`.
    """
    if kv_heads is not None and layout != "bhsd" and not is_dynamo_compiling():
        split = _normalise_qkv(
            layout, None, None, qkv, q_weight, k_weight, cos, sin, position_ids, kv_heads, eps,
            unit_offset, rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if split is not NotImplemented:
            return split
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        options |= norm_options(eps, unit_offset)
        operator, name = rope.rms_norm_rotary_qkv, "rms_norm_rotary_qkv"
        others = q_weight, k_weight, cos, sin, position_ids
        return split_by(operator, name, qkv, others, kv_heads, options, layout)
    except Exception:
        raise_argument_error(rms_norm_rotary_qkv)
        raise


def _check_rows_need_no_grad(function: str, *rows: Tensor | None) -> None:
    *weights, _, _, _ = rows
    names = ("weight",) if len(weights) == 1 else ("q_weight", "k_weight")
    check_needs_no_grad(function, dict(zip((*names, "cos", "sin"), rows, strict=False)))


_normalise, _normalise_qk = map(direct_call, ("rms_norm_rotary", "rms_norm_rotary_qk"))
_normalise_qkv = direct_call("rms_norm_rotary_qkv")
_normalise_in_place = direct_call("rms_norm_rotary_")
_normalise_in_place_qk = direct_call("rms_norm_rotary_qk_")
_normalise_into, _normalise_into_qk = map(
    direct_call, ("rms_norm_rotary.out", "rms_norm_rotary_qk.out")
)

_ONE = Rotation(
    function="rms_norm_rotary",
    names=("x",),
    new=rope.rms_norm_rotary,
    in_place=rope.rms_norm_rotary_,
    into=rope.rms_norm_rotary.out,
    decomposed=None,
    one=None,
    check_rows=_check_rows_need_no_grad,
)
_BOTH = Rotation(
    function="rms_norm_rotary_qk",
    names=("q", "k"),
    new=rope.rms_norm_rotary_qk,
    in_place=rope.rms_norm_rotary_qk_,
    into=rope.rms_norm_rotary_qk.out,
    decomposed=None,
    one=None,
    check_rows=_check_rows_need_no_grad,
)
