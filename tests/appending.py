"""The operators that write to a paged cache: arguments by name, and the same in plain PyTorch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import (
    assert_same_bits,
    on_cpu,
    random,
    random_cache,
    random_positions,
    random_slots,
    random_table,
)

import rope_ext
from rope_ext import reference

B, S, H, K, L = 2, 5, 4, 2, 9
D, D_LATENT, R, RANK = 16, 24, 8, 32  # of 24 channels 16 stay
BLOCKS, BLOCK_SIZE = 3, 8
SLOTS = BLOCKS * BLOCK_SIZE  # for 10 tokens
F8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Appending:
    """operator and function: return nothing. reference: what the tensors in `written` become, from
    copies on the CPU or, with on_device, from the arguments themselves.
    """

    operator: torch._ops.OpOverloadPacket
    function: Callable[..., None]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    arguments: Callable[..., dict[str, Any]]  # (device, dtype, cache dtype) and sizes
    written: tuple[str, ...]
    on_device: bool = False

    def expected_of(self, arguments):
        """What the written tensors become."""
        if not self.on_device:
            arguments = {n: x.cpu() if isinstance(x, torch.Tensor) else x
                         for n, x in arguments.items()}  # fmt: skip
        written = *self.written, *(n for n in ("q_out", "q_scale_out") if n in arguments)
        return dict(zip(written, self.reference(**arguments), strict=True))

    def append(self, arguments, function=None):
        """Calls the operator, or a function with its parameters."""
        options = dict(arguments)
        schema = self.operator.default._schema
        names = [a.name for a in schema.arguments if not a.kwarg_only]
        positional = [options.pop(name) for name in names if name in options]
        assert (function or self.operator)(*positional, **options) is None

    def assert_appends(self, arguments, **options):
        """The bits are those of the steps in plain PyTorch, and other tensors do not change."""
        kept = {name: t.clone() for name, t in arguments.items() if name not in self.written}
        expected = self.expected_of({**arguments, **options})
        self.append({**arguments, **options})
        for name, t in {**kept, **expected}.items():
            assert_same_bits(arguments[name], t)

    def assert_refused(self, arguments, expected):
        """With this error, and nothing is written or counted as written."""
        tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        kept = {n: (as_bytes(t).clone(), t._version) for n, t in tensors.items()}
        message = f"{self.operator.default._schema.name}: expected {expected}"
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
            self.append(arguments)
        for name, (before, version) in kept.items():
            assert torch.equal(as_bytes(arguments[name]), before), name
            assert arguments[name]._version == version, name


def as_bytes(t):
    return t.detach().cpu().contiguous().flatten().view(torch.uint8)


def of_keys_and_values(
    device, dtype=torch.float32, cache_dtype=None, *, tokens=(B, S), heads=(H, K), dim=D,
    width=None, blocks=BLOCKS, scales=False,
):  # fmt: skip
    cos, sin = random_table(L, width or dim // 2, device=device)
    h, k = heads
    shape, cache_dtype = (blocks, BLOCK_SIZE, k, dim), cache_dtype or dtype
    made = {
        "q": random(*tokens, h, dim, dtype=dtype, device=device),
        "k": random(*tokens, k, dim, dtype=dtype, device=device, seed=1),
        "v": random(*tokens, k, dim, dtype=dtype, device=device, seed=2),
        "k_cache": random_cache(*shape, dtype=cache_dtype, device=device),
        "v_cache": random_cache(*shape, dtype=cache_dtype, device=device, seed=6),
        "slot_mapping": random_slots(*tokens, capacity=blocks * BLOCK_SIZE, device=device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(*tokens, rows=L, device=device),
    }
    if scales:
        made["k_scale"] = torch.linspace(0.02, 0.3, k, device="cpu").to(device)  # one a head
        made["v_scale"] = torch.tensor(1.7, device=device)
    return made


def of_a_latent(
    device, dtype=torch.float32, cache_dtype=None, *, tokens=(B, S), heads=H, dim=D_LATENT,
    rotary_dim=R, rank=RANK, blocks=BLOCKS, scales=False,
):  # fmt: skip
    cos, sin = random_table(L, rotary_dim // 2, device=device)
    row = blocks, BLOCK_SIZE, rank + rotary_dim
    made = {
        "q": random(*tokens, heads, dim, dtype=dtype, device=device),
        "k_pe": random(*tokens, rotary_dim, dtype=dtype, device=device, seed=1),
        "kv_c": random(*tokens, rank, dtype=dtype, device=device, seed=2),
        "kv_cache": random_cache(*row, dtype=cache_dtype or dtype, device=device),
        "slot_mapping": random_slots(*tokens, capacity=blocks * BLOCK_SIZE, device=device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(*tokens, rows=L, device=device),
    }
    if scales:
        made["scale"] = torch.tensor([0.3], device=device)
    return made


def of_normed_keys_and_values(
    device, dtype=torch.float32, cache_dtype=None, *, weights=None, **how
):
    """weights: their dtype."""
    made = of_keys_and_values(device, dtype, cache_dtype, **how)
    for name, seed in (("q_weight", 7), ("k_weight", 8)):
        made[name] = random(how.get("dim", D), dtype=weights or dtype, device=device, seed=seed)
    return made


def norm_then_append(
    q, k, v, k_cache, v_cache, slot_mapping, q_weight, k_weight, cos, sin, position_ids=None, *,
    norm_v=False, k_scale=None, v_scale=None, q_out=None, q_scale=None, q_scale_out=None,
    **options,
):  # fmt: skip
    """By the operator that normalises, on the device: sums are in another order on another one. v
    is normalised as k is, with factors of 1, and not rotated: by cos = 1 and sin = 0. These would
    spread the NaN of an infinite channel, whose root mean square makes the others of its row 0.
    """
    norm_and_rotate = torch.ops.rope.rms_norm_rotary_qk
    rotated = norm_and_rotate(q, k, q_weight, k_weight, cos, sin, position_ids, **options)
    if norm_v:
        factor = 0.0 if options.get("unit_offset") else 1.0
        one, zero, factors = (torch.full(t.shape, x, dtype=t.dtype).to(t.device)
                              for t, x in ((cos, 1.0), (sin, 0.0), (k_weight, factor)))  # fmt: skip
        normed = norm_and_rotate(q, v, q_weight, factors, one, zero, position_ids, **options)[1]
        infinite = v.isinf().any(-1, keepdim=True) & ~v.isnan().any(-1, keepdim=True)
        v = (v * 0).where(infinite, normed).cpu().copysign(v.cpu())  # -0 - 0 is 0
    q, rotated_q, k = on_cpu((q, *rotated))
    v, *caches, slots = on_cpu((v, k_cache, v_cache, slot_mapping))
    scales = on_cpu((k_scale, v_scale))
    q, *float8 = reference._as_float8(q, rotated_q, *on_cpu((q_out, q_scale, q_scale_out)))
    stored = (reference._stored(cache, x, slots, scale)
              for cache, x, scale in zip(caches, (k, v), scales, strict=True))  # fmt: skip
    return q, k, v, *stored, *float8


KV = Appending(
    torch.ops.rope.apply_rotary_qk_append_kv_,
    rope_ext.apply_rotary_qk_append_kv_,
    reference.apply_rotary_qk_append_kv,
    of_keys_and_values,
    ("q", "k", "k_cache", "v_cache"),
)
NORMED = Appending(
    torch.ops.rope.rms_norm_rotary_qk_append_kv_,
    rope_ext.rms_norm_rotary_qk_append_kv_,
    norm_then_append,
    of_normed_keys_and_values,
    ("q", "k", "v", "k_cache", "v_cache"),
    on_device=True,
)
LATENT = Appending(
    torch.ops.rope.apply_rotary_mla_append_,
    rope_ext.apply_rotary_mla_append_,
    reference.apply_rotary_mla_append,
    of_a_latent,
    ("q", "k_pe", "kv_cache"),
)


# ---- changes of good arguments


def changed(name, change):
    return lambda given: {name: change(given[name])}


def inside(name, other):
    """Argument `name` as a part of the memory of `other`."""

    def change(given):
        whole = given[other].flatten().view(torch.uint8)
        wanted = given[name]
        count = wanted.numel() * wanted.element_size()
        return {name: whole[:count].view(wanted.dtype).view(wanted.shape)}

    return change
