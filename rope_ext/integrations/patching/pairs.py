"""Ways to pair channels and to read tables of cos and sin, and rotations by them.

x is [..., heads, channels] or [..., heads, tokens, channels]; heads_axis is the axis of the heads,
-2 or -3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from rope_ext._engine.calls import call
from rope_ext._engine.direct import direct_call
from rope_ext.options import rotation_options

_rotate_both = direct_call("apply_rotary_qk")


class Pairs(NamedTuple):
    """Which channels are a pair, and which columns of cos and sin belong to it."""

    name: str  # for reports
    # "a channel", "a pair"; of columns that repeat themselves "first half", or "even and odd": the
    # even ones of cos and the odd ones of sin
    columns: str
    interleaved: bool = False
    interleaved_out: bool | None = None  # None: as interleaved
    last_channels: bool = False  # rotate the last channels of a head instead of the first
    negated: bool = False  # rotate by the negative angle

    def rows(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin as the operators take them."""
        if self.columns == "first half":
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half], sin[..., :half]
        elif self.columns == "even and odd":
            cos, sin = cos[..., ::2], sin[..., 1::2]
        cos, sin = adjacent(cos), adjacent(sin)
        # Not inverse=True, the transpose: it differs if the two columns of a pair differ.
        return cos, -sin if self.negated else sin

    @property
    def takes_tables_as_they_are(self) -> bool:
        """Whether :meth:`rows` returns cos and sin themselves, if their last stride is 1."""
        return self.columns in ("a channel", "a pair") and not self.negated

    def channels(self, cos: Tensor, head_dim: int) -> tuple[int, int]:
        """rotary_dim and rotary_offset; cos as :meth:`rows` returns it."""
        rotary_dim = cos.shape[-1] if self.columns == "a channel" else 2 * cos.shape[-1]
        return rotary_dim, head_dim - rotary_dim if self.last_channels else 0

    def options(self, cos: Tensor, head_dim: int) -> dict[str, Any]:
        """The operators' keywords; cos as :meth:`rows` returns it."""
        channels = self.channels(cos, head_dim)
        return rotation_options(*channels, self.interleaved, self.interleaved_out)


# The first that agrees with a function is taken.
ALL_PAIRS = (
    Pairs("half-split", "a channel"),
    Pairs("interleaved", "a channel", interleaved=True),
    Pairs("half-split, one angle a pair", "a pair"),
    Pairs("interleaved, one angle a pair", "a pair", interleaved=True),
    Pairs("interleaved, first half of the table", "first half", interleaved=True),
    Pairs(
        "interleaved in, halves out",
        "first half",
        interleaved=True,
        interleaved_out=False,
    ),
    Pairs(
        "interleaved in, halves out, one angle a channel",
        "a channel",
        interleaved=True,
        interleaved_out=False,
    ),
    Pairs("interleaved, even and odd columns of the table", "even and odd", interleaved=True),
    Pairs("half-split, negative angle", "a channel", negated=True),
    Pairs("last channels, half-split", "a channel", last_channels=True),
    Pairs("last channels, interleaved", "a channel", interleaved=True, last_channels=True),
    Pairs(
        "last channels, interleaved, one angle a pair",
        "a pair",
        interleaved=True,
        last_channels=True,
    ),
)


def rotate(
    pairs: Pairs,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads_axis: int,
    position_ids: Tensor | None = None,
) -> Tensor:
    """x rotated by rows [S, W] or [1|B, S, W], or by a table that position_ids indexes."""
    x = adjacent(x)
    cos, sin = pairs.rows(cos, sin)
    options = pairs.options(cos, x.shape[-1])
    if heads_axis == -2:
        return call(torch.ops.rope.apply_rotary, (x, cos, sin, position_ids), options)
    x = x.transpose(-3, -2)
    return call(torch.ops.rope.apply_rotary, (x, cos, sin, position_ids), options).transpose(-3, -2)


def rotate_both(
    pairs: Pairs,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads_axis: int,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k rotated by the same rows, in one call if their tokens and dtypes are the same."""
    seq_axis = -5 - heads_axis
    same = q.dtype == k.dtype and q.shape[-1] == k.shape[-1]
    if not same or q.dim() != k.dim() or q.shape[seq_axis] != k.shape[seq_axis]:
        return (
            rotate(pairs, q, cos, sin, heads_axis, position_ids),
            rotate(pairs, k, cos, sin, heads_axis, position_ids),
        )
    if q.dim() == 4 and pairs.takes_tables_as_they_are and not is_dynamo_compiling():
        layout = "bhsd" if heads_axis == -3 else "bshd"
        rotary_dim, offset = pairs.channels(cos, q.shape[-1])
        rotated = _rotate_both(
            layout, None, None, q, k, cos, sin, position_ids,
            rotary_dim, offset, pairs.interleaved, pairs.interleaved_out, False,
        )  # fmt: skip
        if rotated is not NotImplemented:
            return rotated
    q, k = adjacent(q), adjacent(k)
    cos, sin = pairs.rows(cos, sin)
    options = pairs.options(cos, q.shape[-1])
    rope = torch.ops.rope
    if heads_axis == -2:
        return call(rope.apply_rotary_qk, (q, k, cos, sin, position_ids), options)
    q, k = q.transpose(-3, -2), k.transpose(-3, -2)
    q, k = call(rope.apply_rotary_qk, (q, k, cos, sin, position_ids), options)
    return q.transpose(-3, -2), k.transpose(-3, -2)


def adjacent(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the operators require.

    It is not in zaya (channels of heads), and in the transposed tables of gpt_oss's rotary module
    before transformers 5.6.
    """
    return x if x.stride(-1) == 1 else x.contiguous()
