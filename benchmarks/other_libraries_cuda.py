"""Other libraries that rotate q and k, or normalise them, on a GPU.

Each is a Way. Its `prepare` raises ImportError if the library is not installed, and Skip if the
library does not have the case. It also makes tables in the form and dtype of the library.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from operator_case import Arguments, Way
from other_libraries import Skip, widened
from torch import Tensor

rope = torch.ops.rope


@functools.lru_cache(maxsize=8)
def tables_like(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return cos.to(dtype), sin.to(dtype)


@functools.lru_cache(maxsize=8)
def rows_like(
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of a half-split rotation, a column a channel: [1|B, S, R]."""
    rows = (t[None] if position_ids is None else t[position_ids] for t in (cos, sin))
    cos, sin = (widened(t, False).to(dtype) for t in rows)
    return cos, sin


def flash_attn(arguments: Arguments, inplace: bool) -> Arguments:
    """Triton, two launches; cos and sin in the dtype of x, [L, P]."""
    from flash_attn.layers.rotary import apply_rotary_emb

    q, k, positions = arguments["q"], arguments["k"], arguments.get("position_ids")
    cos, sin = tables_like(arguments["cos"], arguments["sin"], q.dtype)
    options = {"interleaved": arguments["interleaved"], "inplace": inplace}
    options["seqlen_offsets"] = 0 if positions is None else positions[:, 0]
    rotate = functools.partial(apply_rotary_emb, cos=cos, sin=sin, **options)
    return {"rotate": rotate, "q": q, "k": k}


def liger(arguments: Arguments) -> Arguments:
    """Triton, one launch, writes into q and k; [B, H, S, D] in the memory order of [B, S, H, D]."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    q, k, cos, sin = (arguments[name] for name in ("q", "k", "cos", "sin"))
    if arguments["interleaved"] or 2 * cos.shape[-1] < q.shape[-1]:
        raise Skip("half-split over the whole head only")
    cos, sin = rows_like(cos, sin, arguments.get("position_ids"), q.dtype)
    rotate = functools.partial(liger_rotary_pos_emb, cos=cos, sin=sin)
    return {"rotate": rotate, "q": q.transpose(1, 2), "k": k.transpose(1, 2)}


def transformer_engine(arguments: Arguments) -> Arguments:
    """CUDA, two launches; takes angles [S, 1, 1, R] and computes cos and sin in each launch."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    if "position_ids" in arguments:
        raise Skip("positions 0, 1, 2, ... only")
    cos, sin, interleaved = (arguments[name] for name in ("cos", "sin", "interleaved"))
    angles = widened(torch.atan2(sin.double(), cos.double()).float(), interleaved)
    options = {"tensor_format": "bshd", "interleaved": interleaved, "fused": True}
    rotate = functools.partial(
        apply_rotary_pos_emb, freqs=angles[:, None, None].contiguous(), **options
    )
    return {"rotate": rotate, "q": arguments["q"], "k": arguments["k"]}


def one_by_one(rotate: Callable[[Tensor], Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q), rotate(k)


def heads_first(rotate: Callable[..., Any], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = rotate(q, k)
    return q.transpose(1, 2), k.transpose(1, 2)


def rotations_of_other_libraries(in_place: bool) -> dict[str, Way]:
    flash = Way(one_by_one, functools.partial(flash_attn, inplace=in_place))
    if in_place:
        return {"flash-attn": flash, "Liger": Way(heads_first, liger)}
    return {
        "flash-attn": flash,
        "TransformerEngine": Way(one_by_one, transformer_engine, angle_roundings=1),
    }


def quack(arguments: Arguments) -> Arguments:
    """RMSNorm in the CuTe DSL, of q and of k. QuACK rotates only in the epilogue of a GEMM."""
    from quack import rmsnorm

    if arguments["q_weight"].dim() > 1:
        raise Skip("not tried on rows of all heads")
    return {"norm": rmsnorm, **arguments}


def norm_then_rotate(
    norm: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    eps: float,
) -> Any:
    """The norm of a library, then the rotation of rope_ext."""
    normalised = (norm(x, weight, eps=eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return rope.apply_rotary_qk(*normalised, cos, sin, position_ids)


NORMS_OF_OTHER_LIBRARIES = {"QuACK's RMSNorm, then apply_rotary_qk": Way(norm_then_rotate, quack)}
