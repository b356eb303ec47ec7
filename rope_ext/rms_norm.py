"""RMSNorm of q and k and their rotation, in one pass, as a typed function."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._argument_errors import raise_argument_error
from rope_ext._engine.calls import call
from rope_ext._engine.direct import direct_call
from rope_ext.options import Layout, as_bshd, from_bshd, norm_options, rotation_options

_norm_and_rotate = direct_call("rms_norm_rotary_qk")


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
    if not is_dynamo_compiling():
        rotated = _norm_and_rotate(
            layout, None, None, q, k, q_weight, k_weight, cos, sin, position_ids, eps, unit_offset,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse,
        )  # fmt: skip
        if rotated is not NotImplemented:
            return rotated
    try:
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        options |= norm_options(eps, unit_offset)
        function = "rms_norm_rotary_qk"
        views = as_bshd(q, layout, function, "q"), as_bshd(k, layout, function, "k")
        args = (*views, q_weight, k_weight, cos, sin, position_ids)
        out_q, out_k = call(torch.ops.rope.rms_norm_rotary_qk, args, options)
        return from_bshd(out_q, layout), from_bshd(out_k, layout)
    except Exception:
        raise_argument_error(rms_norm_rotary_qk)
        raise
