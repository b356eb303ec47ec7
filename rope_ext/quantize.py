"""The rotation whose result is float8 with a scale of each group of channels: for inference."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._argument_errors import raise_argument_error
from rope_ext._engine.calls import call
from rope_ext._engine.direct import direct_call
from rope_ext.options import Layout, as_bshd, rotation_options

rope = torch.ops.rope
_quantize = direct_call("apply_rotary_quantize")


def apply_rotary_quantize(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    x_out: Tensor,
    scale_out: Tensor,
    group_size: int = 128,
    eps: float = 1e-10,
    power_of_two_scales: bool = False,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    interleaved: bool = False,
    interleaved_out: bool | None = None,
    inverse: bool = False,
    layout: Layout = "bshd",
) -> tuple[Tensor, Tensor]:
    """Rotates x and writes it as float8, with a scale for each group of a head's channels.

    For the output of DeepSeek-V4's attention, whose last channels are turned back before the
    projection in float8: ``inverse=True, interleaved=True, rotary_offset=D - R``. All channels of x
    are quantised, those that do not rotate too. The rotated channels are not rounded to x's dtype
    first: the bits are those of :func:`apply_rotary` of ``x.float()`` (of x if it is float64), the
    largest magnitude of each group, the division by its scale in that dtype, and one rounding to
    float8 (to nearest, ties to even, saturating). This is for inference: nothing may need a
    gradient.

    Args:
        x, cos, sin, position_ids, layout: as for :func:`apply_rotary`.
        x_out: of x's shape, in the same layout, float8_e4m3fn or float8_e5m2. Any strides with the
            last one 1.
        scale_out: float32, of x's shape with D / group_size in the place of D, in the same layout.
            Any strides. It receives max(largest magnitude, eps) divided by the largest value of the
            float8, by which the channels are divided. NaN for a group with a NaN.
        group_size: channels of a head that share a scale: it divides D, into at most 8192 groups.
        eps: the least magnitude that a scale is made for, 1e-30 to 1e30.
        power_of_two_scales: round each scale up to a power of two (UE8M0), so that it is exact as
            float8_e8m0fnu too.
        rotary_dim, rotary_offset, interleaved, interleaved_out, inverse: as for
            :func:`apply_rotary`.

    Returns:
        x_out and scale_out.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`apply_rotary`.

    Source: vLLM's fused_inv_rope_fp8_quant, which does this with powers of two for DeepSeek-V4.
    That kernel multiplies by 1 / 448 instead of dividing by 448: a scale within a rounding of a
    power of two may become another one.
    """
    if not is_dynamo_compiling():
        done = _quantize(
            layout, None, None, x, cos, sin, position_ids, group_size, eps, power_of_two_scales,
            rotary_dim, rotary_offset, interleaved, interleaved_out, inverse, x_out, scale_out,
        )  # fmt: skip
        if done is None:
            return x_out, scale_out
    try:
        function = "apply_rotary_quantize"
        given = (("x", x), ("x_out", x_out), ("scale_out", scale_out))
        view, to, scales = (as_bshd(t, layout, function, name) for name, t in given)
        options = rotation_options(rotary_dim, rotary_offset, interleaved, interleaved_out, inverse)
        options |= {"group_size": group_size, "eps": eps, "x_out": to, "scale_out": scales}
        options["power_of_two_scales"] = power_of_two_scales
        written = x_out, scale_out
        call(rope.apply_rotary_quantize, (view, cos, sin, position_ids), options, written)
        return written
    except Exception:
        raise_argument_error(apply_rotary_quantize)
        raise
