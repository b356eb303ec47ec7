"""Megatron-Core's rotations under ``apply_rope_fusion=True``, without Transformer Engine.

Call :func:`patch` once, before a config is made::

    from rope_ext.integrations import megatron

    megatron.patch()
    config = TransformerConfig(..., apply_rope_fusion=True)

Source: megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2,
``megatron/core/models/common/embeddings/rope_utils.py`` and
``megatron/core/fusions/fused_mla_yarn_rope_apply.py``.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rope_ext.integrations._replaced_functions import ReplacedFunctions
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.integrations.reference_apis.transformer_engine import (
    angles_of_tokens,
    packed_positions,
)
from rope_ext.rotation import apply_rotary

KNOWN_RELEASES = ("0.16", "0.17", "0.18", "0.19")

_NEIGHBOURS_TO_HALVES = {"interleaved": True, "interleaved_out": False}
_replaced = ReplacedFunctions()


def patch() -> None:
    """Gives Megatron-Core these rotations for configs with ``apply_rope_fusion=True``.

    Replaces ``apply_rotary_pos_emb``, ``fused_apply_rotary_pos_emb`` and
    ``fused_apply_rotary_pos_emb_thd`` of its ``rope_utils``, and the two functions of its fused
    latent attention, in every module that has imported them. With ``apply_rope_fusion=False``
    Megatron-Core goes on to rotate itself. A second call changes nothing.

    Raises:
        ImportError: without Megatron-Core.
        RuntimeError: for a release that this was not tested with. Nothing has been changed then.
    """
    from megatron.core import __version__
    from megatron.core.fusions import fused_mla_yarn_rope_apply
    from megatron.core.models.common.embeddings import rope_utils

    release = ".".join(re.findall(r"\d+", __version__)[:2])
    if release not in KNOWN_RELEASES:
        raise RuntimeError(
            f"rope_ext.integrations.megatron.patch: expected megatron-core {KNOWN_RELEASES[0]} to "
            f"{KNOWN_RELEASES[-1]}, got {__version__}: install a release that was tested"
        )
    if _replaced:
        return
    own = rope_utils.apply_rotary_pos_emb
    _replaced.replace(rope_utils, "apply_rotary_pos_emb", _with_fusion(own))
    for function in (fused_apply_rotary_pos_emb, fused_apply_rotary_pos_emb_thd):
        _replaced.replace(rope_utils, function.__name__, function)
    for function in (fused_apply_mla_rope_for_q, fused_apply_mla_rope_for_kv):
        _replaced.replace(fused_mla_yarn_rope_apply, function.__name__, function)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _replaced.restore()


def _with_fusion(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron-Core's function that picks a rotation by the config.

    With fusion, it leaves out the scale of YaRN for packed sequences, and before 0.18 also
    ``rotary_interleaved``; other sequences it does not fuse if there is a scale, or if positions
    are multimodal and differ within a batch.
    """
    # Since 0.19 the caller says whether neighbours become halves, before it is the config.
    latent = {"mla_rotary_interleaved"} & inspect.signature(own).parameters.keys()

    @functools.wraps(own)
    def apply_rotary_pos_emb(
        t: Tensor,
        freqs: Tensor,
        config: Any,
        cu_seqlens: Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
        mla_rotary_interleaved: bool | None = False if latent else None,
    ) -> Tensor:
        if not config.apply_rope_fusion:
            options = dict.fromkeys(latent, mla_rotary_interleaved)
            return own(t, freqs, config, cu_seqlens, mscale, cp_group, **options)
        if mla_rotary_interleaved is None:
            mla_rotary_interleaved = config.multi_latent_attention
        order = _NEIGHBOURS_TO_HALVES
        if not mla_rotary_interleaved:
            order = {"interleaved": config.rotary_interleaved}
        if cu_seqlens is None:
            return _rotated(t, freqs, order, mscale)
        if cp_group is None:
            from megatron.core import parallel_state

            cp_group = parallel_state.get_context_parallel_group()
        return _rotated(t, freqs, order, mscale, cu_seqlens, cp_group.size(), cp_group.rank())

    return apply_rotary_pos_emb


@names_arguments
def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """Rotates t by angles.

    Args:
        t: [S, B, H, D].
        freqs: angles in radians, [S, 1|B, 1, R], one for each channel.
        transpose_output_memory: accepted and ignored, as by Megatron-Core.
        interleaved: pairs are neighbouring channels instead of halves.

    Returns:
        The rotated t.

    Raises:
        ValueError: for wrong shapes.
    """
    return _rotated(t, freqs, {"interleaved": interleaved})


@names_arguments
def fused_apply_rotary_pos_emb_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """Rotates packed sequences by angles.

    Args:
        t: [T, H, D], this rank's tokens.
        cu_seqlens: int32 or int64 [sequences + 1], of all ranks together.
        freqs: [s2, 1, 1, R], a row for each position; or, if s2 is the last of cu_seqlens, a row
            for each token of the batch, as multimodal positions need.
        cp_size, cp_rank, interleaved: see
            :func:`rope_ext.integrations.reference_apis.transformer_engine.apply_rotary_pos_emb`.

    Returns:
        The rotated t.

    Raises:
        ValueError: for wrong shapes and ranks, and on the CPU for a position past freqs.
    """
    return _rotated(t, freqs, {"interleaved": interleaved}, 1.0, cu_seqlens, cp_size, cp_rank)


def _rotated(
    t: Tensor,
    freqs: Tensor,
    order: dict[str, bool],
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """t, rotated by freqs, in sequences of one length or packed. order: of the pairs."""
    layout = "sbhd" if cu_seqlens is None else "thd"
    if cu_seqlens is not None:
        # A row of freqs for each token, else one for each position. Decided without reading
        # cu_seqlens: that would wait for the device.
        start = cu_seqlens[:-1] * (cu_seqlens[-1] == freqs.shape[0])
        angles = angles_of_tokens(t, freqs, layout, start, cu_seqlens, cp_size, cp_rank)
    elif freqs.dim() == 4 and freqs.shape[1] > 1:
        if freqs.shape[:3] != (*t.shape[:2], 1):
            refuse("megatron.apply_rotary_pos_emb", "freqs", "to have the S and B of t", freqs)
        angles = freqs[:, :, 0].transpose(0, 1)  # [B, S, R]
    else:
        angles = angles_of_tokens(t, freqs, layout)
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return apply_rotary(t, cos, sin, rotary_dim=freqs.shape[-1], layout=layout, **order)


@names_arguments
def fused_apply_mla_rope_for_q(
    t: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_head_dim: int,
    emb_dim: int,
    cu_seqlens_q: Tensor | None = None,
    cp_rank: int = 0,
    cp_size: int = 1,
    rotary_interleaved: bool = False,
) -> Tensor:
    """Rotates the last channels of the queries of latent attention.

    Pairs are neighbours in t and halves in the result.

    Args:
        t: [S, B, H, qk_head_dim + emb_dim] or packed [T, H, qk_head_dim + emb_dim].
        cos, sin: [s2, 1, 1, emb_dim], a row for each position.
        qk_head_dim, emb_dim: the channels that stay, then those that rotate.
        cu_seqlens_q: for packed t, int32 or int64 [sequences + 1], of all ranks together.
        cp_rank, cp_size: as for :func:`fused_apply_rotary_pos_emb_thd`, for packed t only: without
            cu_seqlens_q the table has the rows of this rank.
        rotary_interleaved: False, as in Megatron-Core.

    Returns:
        A new tensor; Megatron-Core's kernel writes into t.

    Raises:
        ValueError: for wrong shapes and ranks.
        RuntimeError: on the CPU, for a position past the table.
    """
    function = "megatron.fused_apply_mla_rope_for_q"
    if t.shape[-1] != qk_head_dim + emb_dim:
        refuse(function, "t", f"to have {qk_head_dim} + {emb_dim} channels", t)
    return _rotated_latent(
        function, t, cos, sin, emb_dim, cu_seqlens_q, cp_size, cp_rank, rotary_interleaved
    )


@names_arguments
def fused_apply_mla_rope_for_kv(
    kv: Tensor,
    k_pos_emb: Tensor,
    cos: Tensor,
    sin: Tensor,
    emb_dim: int,
    k_dim: int,
    v_dim: int,
    cu_seqlens_kv: Tensor | None = None,
    cp_rank: int = 0,
    cp_size: int = 1,
    rotary_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Splits keys and values of latent attention, and rotates the channels that all heads share.

    Args:
        kv: [S, B, H, k_dim + v_dim] or packed [T, H, k_dim + v_dim].
        k_pos_emb: [S, B, 1, emb_dim] or [T, 1, emb_dim].
        cu_seqlens_kv: for packed kv, int32 or int64 [sequences + 1], of all ranks together.
        cos, sin, emb_dim, cp_rank, cp_size, rotary_interleaved: as for
            :func:`fused_apply_mla_rope_for_q`.

    Returns:
        The keys, [..., H, k_dim + emb_dim], and the values, [..., H, v_dim], a view of kv.

    Raises:
        ValueError, RuntimeError: as :func:`fused_apply_mla_rope_for_q`.
    """
    function = "megatron.fused_apply_mla_rope_for_kv"
    if kv.shape[-1] != k_dim + v_dim:
        refuse(function, "kv", f"to have {k_dim} + {v_dim} channels", kv)
    shape = (*kv.shape[:-2], 1, emb_dim)
    if k_pos_emb.shape != shape:
        refuse(function, "k_pos_emb", f"to have shape {list(shape)}", k_pos_emb)
    shared = _rotated_latent(
        function, k_pos_emb, cos, sin, emb_dim, cu_seqlens_kv, cp_size, cp_rank, rotary_interleaved
    )
    own, value = kv.split([k_dim, v_dim], dim=-1)
    return torch.cat((own, shared.expand(*own.shape[:-1], emb_dim)), dim=-1), value


def _rotated_latent(
    function: str,
    t: Tensor,
    cos: Tensor,
    sin: Tensor,
    emb_dim: int,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    rotary_interleaved: bool,
) -> Tensor:
    """t, of which the last emb_dim channels rotate."""
    if rotary_interleaved:
        refuse(function, "rotary_interleaved", "to be False", rotary_interleaved)
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.dim() != 4 or table.shape[1:] != (1, 1, emb_dim):
            refuse(function, name, f"to have shape [s2, 1, 1, {emb_dim}]", table)
    if not 0 <= cp_rank < cp_size:
        refuse(function, "cp_rank", f"to be in [0, {cp_size}), of cp_size ranks", cp_rank)
    at, layout = None, "sbhd"
    if cu_seqlens is not None:
        at, layout = packed_positions(t.shape[0], None, cu_seqlens, cp_size, cp_rank), "thd"
    options = {"rotary_dim": emb_dim, "rotary_offset": t.shape[-1] - emb_dim}
    cos, sin = cos[:, 0, 0], sin[:, 0, 0]
    return apply_rotary(t, cos, sin, at, layout=layout, **options, **_NEIGHBOURS_TO_HALVES)
