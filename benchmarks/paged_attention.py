"""The attention of a layer over a paged cache: all that differs between the models of paged_server.

What rope_ext does is there in two ways, which give the same bits: `fused` in one operator, and
`apart` in separate steps, for comparison. The projections are those of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rope_ext

SCALES = (0.05, 0.08)  # of float8 caches, from the first head to the last


@dataclass
class Step:
    """The inputs of a step for all layers: T packed tokens, a part of each of n sequences."""

    tokens: Tensor  # int64 [T]
    bounds: list[int]  # n + 1: the start of each sequence's part, and T
    cached: list[int]  # n: earlier tokens of each sequence
    block_table: Tensor  # int64 [n, most blocks], -1 for no block
    slots: Tensor  # int64 [T]
    cos: Tensor  # float32 [T, P]
    sin: Tensor  # float32 [T, P]

    def last_tokens(self) -> Tensor:
        return torch.tensor(self.bounds[1:], device=self.tokens.device) - 1


@dataclass
class Move:
    """Keys in these slots get new positions; each tensor is int64 [N]."""

    slots: Tensor
    old: Tensor
    new: Tensor
    inv_freq: Tensor  # [P]


class Cache:
    """Rows [blocks, block_size, heads, channels] of the model's dtype, or of float8 with scales."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.rows, self.dtype, self.scale = rows.to(dtype), rows.dtype, None
        if dtype.itemsize == 1:
            self.scale = torch.linspace(*SCALES, rows.shape[2], device=rows.device)

    def read(self, blocks: Tensor) -> Tensor:
        """The rows of these blocks, [N, heads, channels]."""
        rows = self.rows[blocks].flatten(0, 1).to(self.dtype)
        return rows if self.scale is None else rows * self.scale[:, None]

    def store(self, x: Tensor, slots: Tensor) -> None:
        """Stores x [T, heads, channels], as the operators of rope_ext do."""
        if self.scale is not None:
            x = x / self.scale[:, None]
        self.put(x, slots)

    def put(self, x: Tensor, slots: Tensor) -> None:
        """Stores x in units of the scale."""
        if self.scale is not None:
            largest = torch.finfo(self.rows.dtype).max
            x = x.clamp(-largest, largest)
        self.rows.flatten(0, 1)[slots] = x.to(self.rows.dtype)


NewCache = Callable[[int, int], Cache]  # (heads, channels)


class Heads:
    """Llama: heads of keys, and heads of values."""

    def __init__(self, module: nn.Module, new_cache: NewCache) -> None:
        self.module, self.head_dim = module, module.head_dim
        heads = module.k_proj.out_features // self.head_dim
        self.keys, self.values = self.caches = [new_cache(heads, self.head_dim) for _ in range(2)]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [T, H, D], k and v [T, Hk, D] of x [T, hidden]."""
        projections = (self.module.q_proj, self.module.k_proj, self.module.v_proj)
        return tuple(project(x).unflatten(-1, (-1, self.head_dim)) for project in projections)

    def append_fused(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores the new keys and values, and returns q as attention needs it."""
        caches = (self.keys.rows, self.values.rows, step.slots)
        rope_ext.apply_rotary_qk_append_kv_(
            q, k, v, *caches, step.cos, step.sin, layout="thd", **self.scales()
        )
        return q

    def append_apart(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rope_ext.apply_rotary_qk(q, k, step.cos, step.sin, layout="thd", inplace=True)
        return self.stored(step, q, k, v)

    def stored(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.store(k, step.slots)
        self.values.store(v, step.slots)
        return q

    def scales(self) -> dict[str, Tensor | None]:
        return {"k_scale": self.keys.scale, "v_scale": self.values.scale}

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, [N, Hk, D]."""
        return self.keys.read(blocks), self.values.read(blocks)

    def move_fused(self, move: Move) -> None:
        """Rotates cached keys to their new positions."""
        rope_ext.shift_cached_k_(self.keys.rows, move.slots, move.old, move.new, move.inv_freq)

    def move_apart(self, move: Move) -> None:
        """Reads them, rotates their last channels by the distance, and stores them."""
        keys = self.keys.rows.flatten(0, 1)[move.slots].to(self.keys.dtype)
        last = keys.shape[-1] - 2 * len(move.inv_freq)
        distance, none = move.new - move.old, keys[:, :0]
        keys, _ = rope_ext.apply_rotary_qk_at(
            keys, none, move.inv_freq, distance, rotary_offset=last, layout="thd"
        )
        self.keys.put(keys, move.slots)


class NormedHeads(Heads):
    """Qwen3: q and k are normalised before they rotate."""

    def norm(self) -> tuple[Tensor, Tensor, float]:
        q_norm, k_norm = self.module.q_norm, self.module.k_norm
        return q_norm.weight, k_norm.weight, q_norm.variance_epsilon

    def append_fused(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches, (q_weight, k_weight, eps) = (self.keys.rows, self.values.rows), self.norm()
        rows = (step.slots, q_weight, k_weight, step.cos, step.sin)
        rope_ext.rms_norm_rotary_qk_append_kv_(
            q, k, v, *caches, *rows, eps=eps, layout="thd", **self.scales()
        )
        return q

    def append_apart(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        *weights, eps = self.norm()
        q, k = rope_ext.rms_norm_rotary_qk(
            q, k, *weights, step.cos, step.sin, eps=eps, layout="thd"
        )
        return self.stored(step, q, k, v)


class Latent(Heads):
    """DeepSeek-V3: a row for all heads, the compressed keys and values and one key that rotates."""

    def __init__(self, module: nn.Module, new_cache: NewCache) -> None:
        self.module = module
        self.parts = (module.kv_lora_rank, module.qk_rope_head_dim)
        self.caches = [new_cache(1, sum(self.parts))]
        self.keys = self.caches[0]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [T, H, D], k_pe [T, R] and kv_c [T, rank] of x [T, hidden]."""
        module = self.module
        q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x)))
        kv_c, k_pe = module.kv_a_proj_with_mqa(x).split(self.parts, -1)
        return q.unflatten(-1, (module.num_heads, -1)), k_pe, module.kv_a_layernorm(kv_c)

    def append_fused(self, step: Step, q: Tensor, k_pe: Tensor, kv_c: Tensor) -> Tensor:
        rope_ext.apply_rotary_mla_append_(
            q, k_pe, kv_c, self.keys.rows.squeeze(2), step.slots, step.cos, step.sin,
            scale=self.keys.scale, interleaved=True, interleaved_out=False,
        )  # fmt: skip
        return q

    def append_apart(self, step: Step, q: Tensor, k_pe: Tensor, kv_c: Tensor) -> Tensor:
        rows, first = (step.cos, step.sin), self.module.qk_nope_head_dim
        order = {"layout": "thd", "interleaved": True, "interleaved_out": False}
        q = rope_ext.apply_rotary(q, *rows, rotary_offset=first, **order)
        k_pe = rope_ext.apply_rotary(k_pe.unsqueeze(1), *rows, **order)
        self.keys.store(torch.cat((kv_c.unsqueeze(1), k_pe), -1), step.slots)
        return q

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, [N, H, D]."""
        module = self.module
        kv_c, k_pe = self.keys.read(blocks).split(self.parts, -1)
        kv = module.kv_b_proj(kv_c.squeeze(1)).unflatten(-1, (module.num_heads, -1))
        keys, values = kv.split((module.qk_nope_head_dim, module.v_head_dim), -1)
        return torch.cat((keys, k_pe.expand(-1, module.num_heads, -1)), -1), values

    def move_fused(self, move: Move) -> None:
        rows = self.keys.rows.squeeze(2)
        rope_ext.shift_cached_k_(rows, move.slots, move.old, move.new, move.inv_freq)


FAMILIES = {"llama": Heads, "qwen3": NormedHeads, "deepseek_v3": Latent}  # by model_type
