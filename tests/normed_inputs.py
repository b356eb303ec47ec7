"""Arguments for rms_norm_rotary_qk, and the error bounds of its roundings."""

from dataclasses import dataclass

import torch
from support import DTYPES, on_cpu, random, random_positions, ulp

from rope_ext import reference

rope = torch.ops.rope

B, S, L = 2, 5, 11
F64, F32, _, _ = DTYPES
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    H: int = 4
    K: int = 2
    D: int = 16
    R: int | None = None  # rotary_dim as given
    W: int | None = None  # width of the table; None: half of R or D
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: dtype
    table_dtype: torch.dtype = F32
    table: str = "table"  # or "one for all" [1, S, W], "per token" [B, S, W]
    ids: str | None = None  # "S", "BS", "T"
    all_heads: bool = False
    unit_offset: bool = False
    eps: float = EPS
    interleaved: bool = False
    interleaved_out: bool | None = None
    inverse: bool = False
    offset: int = 0  # rotary_offset
    packed: bool = False
    batch: int = B

    @property
    def options(self):
        return {
            "eps": self.eps,
            "unit_offset": self.unit_offset,
            "rotary_dim": self.R,
            "rotary_offset": self.offset,
            "interleaved": self.interleaved,
            "interleaved_out": self.interleaved_out,
            "inverse": self.inverse,
        }


def inputs_of(case, device):
    """q, k, q_weight, k_weight, cos, sin, position_ids."""
    tokens = (S,) if case.packed else (case.batch, S)
    q = 2 * random(*tokens, case.H, case.D, dtype=F64, seed=1)
    k = 0.3 * random(*tokens, case.K, case.D, dtype=F64, seed=2)
    weights = [
        random(*((heads,) if case.all_heads else ()), case.D, dtype=F64, seed=seed)
        for heads, seed in ((case.H, 3), (case.K, 4))
    ]
    width = case.W or (case.R or case.D) // 2
    rows = {"table": (L,), "one for all": (1, S), "per token": (case.batch, S)}[case.table]
    cos, sin = (random(*rows, width, dtype=case.table_dtype, seed=s) for s in (5, 6))
    shape = {None: None, "S": (S,), "BS": (case.batch, S), "T": (S,)}[case.ids]
    ids = None if shape is None else random_positions(*shape, rows=L)
    weight_dtype = case.weight_dtype or case.dtype
    tensors = [q.to(case.dtype), k.to(case.dtype), *(w.to(weight_dtype) for w in weights), cos, sin]
    return [t if t is None else t.to(device) for t in (*tensors, ids)]


def in_float64(tensors, dtype):
    """As the arithmetic reads them: a float64 table counts as rounded to float32 below float64."""
    cos, sin = (t if dtype == F64 else t.float() for t in tensors[4:6])
    return on_cpu([*tensors[:4], cos, sin, tensors[6]], F64)


def sizes_of(x, weight, rows, case):
    """|x1 c| + |x2 s| for a rotation of |x|: bounds on the terms of each channel."""
    cos, sin, ids = rows
    options = {k: v for k, v in case.options.items() if k not in ("eps", "unit_offset")}
    both = [
        reference.apply_rotary(x.abs(), cos.abs(), sign * sin.abs(), ids, **options)
        for sign in (1, -1)
    ]
    return torch.maximum(*(t.abs() for t in both))


def normalised(x, weight, case):
    """n = x / rms(x), 1 / rms(x), and the factor on n."""
    row = (-1,) if weight.dim() == 1 else (-2, -1)
    rms = (x.square().mean(row, keepdim=True) + case.eps).sqrt()
    return x / rms, 1 / rms, 1 + weight if case.unit_offset else weight


def roundings(case, x):
    """A sum of N squares in any order is off by at most N units (2^-24, or 2^-53), its root by half
    of that. Mean, eps, root, reciprocal, two products, 1 + weight and the rotation add at most 8
    roundings. In float64 the reference has the same errors.
    """
    row = x.shape[-1] * (x.shape[-2] if case.all_heads else 1)
    return (row / 2 + 8) * (2.0**-24 if case.dtype != F64 else 2 * 2.0**-53)


def assert_close(got, exact, size, allowed, what):
    error = (got.detach().cpu().double() - exact).abs()
    half_ulp = 0.5 * ulp(exact, got.dtype)
    excess = error - (half_ulp + allowed * size)
    assert (excess <= 0).all(), f"{what}: {excess.max()} too far, error {error.max()}"


def gradients(case, tensors, seeds):
    leaves = [t.detach().requires_grad_() for t in tensors[:4]]
    outputs = rope.rms_norm_rotary_qk(*leaves, *tensors[4:], **case.options)
    return torch.autograd.grad(outputs, leaves, seeds)
