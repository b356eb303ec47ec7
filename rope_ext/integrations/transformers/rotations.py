"""The rotations of transformers models, each as calls of the operators.

A rotation is a *form*, the arguments that a function takes, together with a :class:`Pairs`, one way
to pair channels and to read tables. The forms below have the parameter names of the functions that
they replace; recognition.py finds the form and the pairs of a model's own function.

x is [..., heads, channels] or [..., heads, tokens, channels]; heads_axis is the axis of the heads,
-2 or -3.
"""

from collections.abc import Callable
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
    columns: str  # "a channel", "a pair", or "first half" of columns that repeat themselves
    interleaved: bool = False
    interleaved_out: bool | None = None  # None: as interleaved
    last_channels: bool = False  # rotate the last channels of a head instead of the first
    negated: bool = False  # rotate by the negative angle

    def rows(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin as the operators take them."""
        if self.columns == "first half":
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half], sin[..., :half]
        cos, sin = adjacent(cos), adjacent(sin)
        # Not inverse=True, the transpose: it differs if the two columns of a pair differ.
        return cos, -sin if self.negated else sin

    @property
    def takes_tables_as_they_are(self) -> bool:
        """Whether :meth:`rows` returns cos and sin themselves, if their last stride is 1."""
        return self.columns != "first half" and not self.negated

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


def heads_axis_of(cos: Tensor, unsqueeze_dim: int) -> int:
    """The axis of the heads in x that is multiplied by ``cos.unsqueeze(unsqueeze_dim)``."""
    axis = unsqueeze_dim - cos.dim() - 1 if unsqueeze_dim >= 0 else unsqueeze_dim
    if axis not in (-2, -3):
        raise ValueError(
            "rope_ext.integrations.transformers: expected unsqueeze_dim to add the axis of heads, "
            f"before the channels or before tokens and channels, got {unsqueeze_dim} for cos of "
            f"shape {list(cos.shape)}"
        )
    return axis


def without_heads(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [S, W] or [B, S, W] of tables that are multiplied with x [B, H, S, D] directly."""
    if cos.dim() == 4:
        return cos.squeeze(1), sin.squeeze(1)
    return cos, sin


def with_identity_rows(cos: Tensor, sin: Tensor, before: int, after: int = 0) -> list[Tensor]:
    """The rows [S, W] or [B, S, W], with rows of no rotation before and after them."""
    pad = torch.nn.functional.pad
    return [pad(cos, (0, 0, before, after), value=1.0), pad(sin, (0, 0, before, after), value=0.0)]


# ------------------------------------------------------------------------------------------ forms


def q_and_k(pairs: Pairs) -> Callable[..., Any]:
    """Most models; k may be None."""

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim):
        axis = heads_axis_of(cos, unsqueeze_dim)
        if k is None:
            return rotate(pairs, q, cos, sin, axis), None
        return rotate_both(pairs, q, k, cos, sin, axis)

    return apply_rotary_pos_emb


def q_shorter_than_k(pairs: Pairs) -> Callable[..., Any]:
    """q has the last tokens of k (muse_glimmer_assistant)."""

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim):
        axis = heads_axis_of(cos, unsqueeze_dim)
        last = cos.shape[-2] - q.shape[-5 - axis]
        return (
            rotate(pairs, q, cos[..., last:, :], sin[..., last:, :], axis),
            rotate(pairs, k, cos, sin, axis),
        )

    return apply_rotary_pos_emb


def q_and_k_unused_position_ids(pairs: Pairs) -> Callable[..., Any]:
    """Tables are rows already; position_ids are unused (deepseek_v3, glmasr, older models)."""

    def apply_rotary_pos_emb(q, k, cos, sin, position_ids, unsqueeze_dim):
        return rotate_both(pairs, q, k, cos, sin, heads_axis_of(cos, unsqueeze_dim))

    return apply_rotary_pos_emb


def q_and_optional_k(pairs: Pairs) -> Callable[..., Any]:
    """Without k, q alone is returned (qwen4_exp)."""

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim):
        axis = heads_axis_of(cos, unsqueeze_dim)
        if k is None:
            return rotate(pairs, q, cos, sin, axis)
        return rotate_both(pairs, q, k, cos, sin, axis)

    return apply_rotary_pos_emb


def q_and_k_by_sections(pairs: Pairs) -> Callable[..., Any]:
    """Tables [3, B, S, W], one each for time, height and width: section i of the channels takes
    table i % 3, and each half of a head has all sections (qwen2_vl and similar before 5.13).
    """

    def apply_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section, unsqueeze_dim):
        cos, sin = (
            torch.cat(
                [axes[i % 3] for i, axes in enumerate(table.split(mrope_section * 2, -1))], -1
            )
            for table in (cos, sin)
        )
        return rotate_both(pairs, q, k, cos, sin, heads_axis_of(cos, unsqueeze_dim))

    return apply_multimodal_rotary_pos_emb


def q_k_and_v(pairs: Pairs) -> Callable[..., Any]:
    """Values are rotated too, by rows of a table [L, W] (clvp)."""

    def apply_rotary_pos_emb(q, k, v, cos, sin, position_ids, unsqueeze_dim):
        axis = unsqueeze_dim - position_ids.dim() - 2 if unsqueeze_dim >= 0 else unsqueeze_dim
        q, k = rotate_both(pairs, q, k, cos, sin, axis, position_ids)
        return q, k, rotate(pairs, v, cos, sin, axis, position_ids)

    return apply_rotary_pos_emb


def one_tensor(pairs: Pairs) -> Callable[..., Any]:
    """x and a table (gemma3n, gemma4, deepseek_v4)."""

    def apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim):
        return rotate(pairs, x, cos, sin, heads_axis_of(cos, unsqueeze_dim))

    return apply_rotary_pos_emb


def one_tensor_sin_first(pairs: Pairs) -> Callable[..., Any]:
    """x [B, S, H, D] (gptj, codegen)."""

    def apply_rotary_pos_emb(tensor, sin, cos):
        return rotate(pairs, tensor, cos, sin, -2)

    return apply_rotary_pos_emb


def one_tensor_longer_tables(pairs: Pairs) -> Callable[..., Any]:
    """x [B, H, S, D], tables [1|B, 1, L, W] with L >= S (esm before 5.12)."""

    def apply_rotary_pos_emb(x, cos, sin):
        cos, sin = (table[:, 0, : x.shape[-2]] for table in (cos, sin))
        return rotate(pairs, x, cos, sin, -3)

    return apply_rotary_pos_emb


def angles_of_one_tensor(pairs: Pairs) -> Callable[..., Any]:
    """tensor [B, S, H, D], freqs [S, P], in radians (qwen2_5_omni's vision encoder before 5.13)."""

    def apply_rotary_pos_emb_vision(tensor, freqs):
        return rotate(pairs, tensor, freqs.cos(), freqs.sin(), -2)

    return apply_rotary_pos_emb_vision


def one_tensor_without_heads(pairs: Pairs) -> Callable[..., Any]:
    """x [B, S, D] (musicflamingo)."""

    def apply_rotary_time_emb(hidden_states, cos, sin):
        return rotate(pairs, hidden_states.unsqueeze(-2), cos, sin, -2).squeeze(-2)

    return apply_rotary_time_emb


def axes_of_one_tensor(pairs: Pairs) -> Callable[..., Any]:
    """Each axis of position_ids [B, S, A] rotates one of A parts of a head (gemma4 vision)."""

    def apply_multidimensional_rope(x, cos, sin, position_ids, unsqueeze_dim):
        axis = heads_axis_of(cos, unsqueeze_dim)
        x = x if axis == -2 else x.transpose(1, 2)
        parts = (position_ids.shape[-1], x.shape[-1] // position_ids.shape[-1])
        # The parts of a head become tokens, each with its own rows: [B * S, A, H, D / A].
        tokens = x.unflatten(-1, parts).transpose(2, 3).flatten(0, 1)
        cos, sin = (
            table.expand(*x.shape[:2], -1).unflatten(-1, parts).flatten(0, 1)
            for table in (cos, sin)
        )
        rotated = rotate(pairs, tokens, cos, sin, -2)
        out = rotated.unflatten(0, x.shape[:2]).transpose(2, 3).flatten(-2)
        return out if axis == -2 else out.transpose(1, 2)

    return apply_multidimensional_rope


def q_and_k_heads_last(pairs: Pairs) -> Callable[..., Any]:
    """q and k [(B,) S, H, D] (vision encoders after qwen2_vl)."""

    def apply_rotary_pos_emb_vision(q, k, cos, sin):
        return rotate_both(pairs, q, k, cos, sin, -2)

    return apply_rotary_pos_emb_vision


def q_and_k_heads_first(pairs: Pairs) -> Callable[..., Any]:
    """q and k [B, H, S, D] (sam3, edgetam_video)."""

    def apply_rotary_pos_emb_2d(q, k, cos, sin):
        return rotate_both(pairs, q, k, *without_heads(cos, sin), -3)

    return apply_rotary_pos_emb_2d


def q_and_k_after_prefix(pairs: Pairs) -> Callable[..., Any]:
    """Tables are for the last tokens; earlier ones, such as a class token, stay (dinov3_vit)."""

    def apply_rotary_pos_emb(q, k, cos, sin, **kwargs):
        cos, sin = without_heads(cos, sin)
        prefix = q.shape[-2] - sin.shape[-2]
        return rotate_both(pairs, q, k, *with_identity_rows(cos, sin, prefix), -3)

    return apply_rotary_pos_emb


def q_and_k_memory(pairs: Pairs) -> Callable[..., Any]:
    """k repeats the tokens of q; its last ones stay (sam2_video, sam3_tracker_video)."""

    def apply_rotary_pos_emb_2d(q, k, cos, sin, num_k_exclude_rope, repeat_freqs_k):
        cos, sin = without_heads(cos, sin)
        rotated_q = rotate(pairs, q, cos, sin, -3)
        tokens = k.shape[-2] - num_k_exclude_rope
        rows = cos.shape[-2]
        if tokens == 0 or (tokens == rows and num_k_exclude_rope == 0):
            return rotated_q, k if tokens == 0 else rotate(pairs, k, cos, sin, -3)
        position_ids = torch.arange(k.shape[-2], device=k.device)
        position_ids = torch.where(position_ids < tokens, position_ids % rows, rows)
        table = with_identity_rows(cos.flatten(0, -2), sin.flatten(0, -2), 0, 1)
        return rotated_q, rotate(pairs, k, *table, -3, position_ids)

    return apply_rotary_pos_emb_2d


def q_and_k_memory_groups(pairs: Pairs) -> Callable[..., Any]:
    """k has groups, each of tokens that stay followed by tokens that rotate (edgetam_video)."""

    def apply_rotary_pos_emb_2d_cross_attn(
        q, k, cos, sin, cos_k, sin_k, num_k_exclude_rope, repeat_freqs_k
    ):
        rotated_q = rotate(pairs, q, *without_heads(cos, sin), -3)
        tokens = k.shape[-2] - num_k_exclude_rope
        if tokens == 0:
            return rotated_q, k
        group, rows = tokens // repeat_freqs_k, cos_k.shape[-2]
        index = torch.arange(k.shape[-2], device=k.device)
        row = index % group - (group - rows)
        position_ids = torch.where((index < tokens) & (row >= 0), row, rows)
        table = with_identity_rows(cos_k.flatten(0, -2), sin_k.flatten(0, -2), 0, 1)
        return rotated_q, rotate(pairs, k, *table, -3, position_ids)

    return apply_rotary_pos_emb_2d_cross_attn


def complex_heads_last(pairs: Pairs) -> Callable[..., Any]:
    """q and k [B, S, H, D], cos + i sin [1|B, S, P] (llama4)."""

    def apply_rotary_emb(xq, xk, freqs_cis):
        return rotate_both(pairs, xq, xk, *real_and_imaginary(freqs_cis), -2)

    return apply_rotary_emb


def complex_heads_first(pairs: Pairs) -> Callable[..., Any]:
    """q and k [B, H, S, D], cos + i sin [1|B, S, P] (deepseek_v2)."""

    def apply_rotary_emb(xq, xk, freqs_cis):
        return rotate_both(pairs, xq, xk, *real_and_imaginary(freqs_cis), -3)

    return apply_rotary_emb


def complex_of_tokens(pairs: Pairs) -> Callable[..., Any]:
    """query and key [B, S, H, D], cos + i sin of S * P elements in any shape (llama4 vision)."""

    def vision_apply_rotary_emb(query, key, freqs_ci):
        freqs_ci = freqs_ci.reshape(query.shape[1], query.shape[-1] // 2).to(query.device)
        return rotate_both(pairs, query, key, *real_and_imaginary(freqs_ci), -2)

    return vision_apply_rotary_emb


def real_and_imaginary(freqs: Tensor) -> tuple[Tensor, Tensor]:
    return freqs.real.contiguous(), freqs.imag.contiguous()


def positions_of_one_tensor(pairs: Pairs) -> Callable[..., Any]:
    """x [B, H, S, D], pos [S] or [B, H, S], the same for all heads (vjepa2).

    Its tables repeat the frequencies by halves while its pairs are neighbours, so the two channels
    of a pair have different angles.
    """

    def rotate_queries_or_keys(x, pos):
        half = x.shape[-1] // 2
        exponent = torch.arange(half, dtype=x.dtype, device=x.device) / (x.shape[-1] / 2.0)
        angle = (pos if pos.dim() == 1 else pos[:, 0]).unsqueeze(-1) * (1.0 / 10000**exponent)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        return rotate(pairs, x, cos, sin, -3)

    return rotate_queries_or_keys


# ------------------------------------------------------------------------ forms that are methods


def method_on_hidden_states(pairs: Pairs) -> Callable[..., Any]:
    """hidden_states [B, S, H * D], (cos, sin) [2, L, 1, 1, W] (wav2vec2_conformer and similar)."""

    def _apply_rotary_embedding(self, hidden_states, relative_position_embeddings):
        heads = hidden_states.unflatten(-1, (self.num_heads, self.head_size))
        cos, sin = relative_position_embeddings[:, : heads.shape[1]].flatten(1, -2)
        return rotate(pairs, heads, cos, sin, -2).flatten(-2)

    return _apply_rotary_embedding


def method_with_sinusoidal_pos(pairs: Pairs) -> Callable[..., Any]:
    """q, k and perhaps v [B, H, S, D], sin and cos side by side [1|B, 1, S, D] (roformer)."""

    def apply_rotary_position_embeddings(sinusoidal_pos, query_layer, key_layer, value_layer):
        sin, cos = sinusoidal_pos.squeeze(1).chunk(2, dim=-1)
        q, k = rotate_both(pairs, query_layer, key_layer, cos, sin, -3)
        if value_layer is None:
            return q, k
        return q, k, rotate(pairs, value_layer, cos, sin, -3)

    return apply_rotary_position_embeddings
