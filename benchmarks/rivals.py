"""Other ways to rotate q and k on a GPU, each as a function of the same arguments.

A maker takes a Case and the tables cos, sin and angles (float32 [S, P]) and the dtype of q and k,
and returns a function of q [B, S, Hq, D] and k [B, S, Hk, D]. It raises Skip where its library does
not offer the case, and ImportError where the library is not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Case
from torch import Tensor

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Skip(Exception):
    """The library has no such rotation."""


@dataclass(frozen=True)
class Tables:
    """Float32 [S, P] each; angles in radians."""

    cos: Tensor
    sin: Tensor
    angles: Tensor


@dataclass(frozen=True)
class Rival:
    make: Callable[[Case, Tables, torch.dtype], Rotation]
    in_place: bool = False
    takes_angles: bool = False  # rounded to float32: the error grows with the position


def widened(table: Tensor, interleaved: bool) -> Tensor:
    """A column a channel, [S, R], from a column a pair, [S, P]."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] as transformers rotates it: cos, sin [1, S, 1, R]."""
    rotary_dim = cos.shape[-1]
    rotated = x[..., :rotary_dim]
    if interleaved:
        half = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).flatten(-2)
    else:
        half = torch.cat((-rotated[..., rotary_dim // 2 :], rotated[..., : rotary_dim // 2]), -1)
    turned = rotated * cos + half * sin
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), -1)


def make_eager(case: Case, tables: Tables, dtype: torch.dtype) -> Rotation:
    cos = widened(tables.cos, case.interleaved)[None, :, None].to(dtype)
    sin = widened(tables.sin, case.interleaved)[None, :, None].to(dtype)
    return lambda q, k: (eager(q, cos, sin, case.interleaved), eager(k, cos, sin, case.interleaved))


def make_compiled(case: Case, tables: Tables, dtype: torch.dtype) -> Rotation:
    torch.compiler.reset()  # each case is compiled for its own shape
    return torch.compile(make_eager(case, tables, dtype), fullgraph=True, dynamic=False)


def make_flash_attn(case: Case, tables: Tables, dtype: torch.dtype, inplace: bool) -> Rotation:
    """Triton, two launches; cos and sin in the dtype of x, [S, P]."""
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = tables.cos.to(dtype), tables.sin.to(dtype)
    options = {"interleaved": case.interleaved, "inplace": inplace}
    return lambda q, k: (
        apply_rotary_emb(q, cos, sin, **options),
        apply_rotary_emb(k, cos, sin, **options),
    )


def make_liger(case: Case, tables: Tables, dtype: torch.dtype) -> Rotation:
    """Triton, one launch, writes into q and k; [B, H, S, D] in the memory order of [B, S, H, D]."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    if case.interleaved or case.rotary_dim < case.head_dim:
        raise Skip("half-split over the whole head only")
    cos, sin = (
        widened(tables.cos, False)[None].to(dtype),
        widened(tables.sin, False)[None].to(dtype),
    )

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rotate


def make_transformer_engine(case: Case, tables: Tables, dtype: torch.dtype) -> Rotation:
    """CUDA, two launches; takes angles [S, 1, 1, R] and computes their sines in each launch."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    angles = widened(tables.angles, case.interleaved)[:, None, None].contiguous()
    options = {"tensor_format": "bshd", "interleaved": case.interleaved, "fused": True}
    return lambda q, k: (
        apply_rotary_pos_emb(q, angles, **options),
        apply_rotary_pos_emb(k, angles, **options),
    )


RIVALS = {
    "eager": Rival(make_eager),
    "torch.compile of eager": Rival(make_compiled),
    "flash-attn": Rival(lambda *a: make_flash_attn(*a, inplace=False)),
    "flash-attn, in place": Rival(lambda *a: make_flash_attn(*a, inplace=True), in_place=True),
    "Liger, in place": Rival(make_liger, in_place=True),
    "TransformerEngine": Rival(make_transformer_engine, takes_angles=True),
}
