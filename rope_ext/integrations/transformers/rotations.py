"""The rotations of transformers models, each as calls of the operators.

A rotation is a *form*, the arguments that a function takes, together with a :class:`Pairs`, one way
to pair channels and to read tables. The forms below have the parameter names of the functions that
they replace; forms.py finds the form and the pairs of a model's own function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rope_ext.integrations.patching.pairs import Pairs, rotate, rotate_both


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
