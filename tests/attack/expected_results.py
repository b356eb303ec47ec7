"""The right result of a call of an operator: bits where the documents promise them, else the exact
numbers and the allowed error.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from appending import norm_then_append
from calls import RECORDS, rope
from normed_inputs import normalised, roundings, sizes_of
from random_arguments import ROTATION_DEFAULTS, Arguments
from support import assert_same_bits, inverse_of, rounded_once, ulp

from rope_ext import reference
from rope_ext._operators.qkv import packed
from rope_ext.reference import split_qkv

F64 = torch.float64
FLOAT8_Q = "q_out", "q_scale", "q_scale_out"


@dataclass
class Expected:
    """A tensor of these bits; or one of this dtype, off by half an ulp and `allowed` at most."""

    value: torch.Tensor
    allowed: torch.Tensor | None = None
    dtype: torch.dtype | None = None

    def check(self, got: torch.Tensor, name: str) -> None:
        try:
            if self.allowed is None:
                return assert_same_bits(got, self.value)
            assert got.shape == self.value.shape, f"shape {list(got.shape)}"
            assert got.dtype == self.dtype, f"dtype {got.dtype}"
            finite = self.value.to(got.dtype).double().isfinite()
            got = got.double()
            assert not got[~finite].isfinite().any(), "a finite number where none can be"
            error = (got - self.value).abs()[finite]
            allowed = (self.allowed + 0.5 * ulp(self.value.nan_to_num(), self.dtype))[finite]
            assert (error <= allowed).all(), (
                f"error {error.max().item():.3g}, allowed {allowed[error.argmax()].item():.3g}"
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def expected_results(name: str, arguments: Arguments) -> list[Expected]:
    """Of the tensors that the operator writes, in the order of its schema; else of its results."""
    operator = name.removeprefix("rope::").removesuffix(".out")
    if RECORDS[name].written:
        operator = operator.removesuffix("_")
    arguments = dict(arguments)
    x, ids = _of_tokens(arguments), arguments.get("position_ids")
    assert not (unfit := _unfit(arguments)), f"taken: {unfit}"
    if "cos" in arguments and ids is not None and x.shape[:-2].numel() == 0:
        # No token has a position, so the positions of other sequences' tokens are arbitrary.
        arguments["position_ids"] = ids.new_zeros(1).expand(ids.shape)
        arguments |= {t: arguments[t].new_zeros(1, arguments[t].shape[-1]) for t in ("cos", "sin")}
    return RESULTS_OF[operator](arguments)


def _of_tokens(a: Arguments) -> torch.Tensor:
    """A tensor [*tokens, heads, D]."""
    if a.get("qkv") is not None:
        return split_qkv(a["qkv"], a["kv_heads"])[2]
    names = ("x", "q", "grad_q", "grad_k", "grad_v")
    return next((a[name] for name in names if a.get(name) is not None), None)


def _unfit(a: Arguments) -> list[str]:
    """Arguments with values that are always invalid."""
    scales = [name for name in ("scale", "k_scale", "v_scale") if a.get(name) is not None]
    unfit = [name for name in scales if not ((a[name] > 0) & a[name].isfinite()).all()]
    if "slot_mapping" in a:
        stored = a["slot_mapping"][a["slot_mapping"] >= 0]
        unfit += ["slot_mapping"] if stored.unique().numel() < stored.numel() else []
    unfit += [] if a.get("eps", 0.0) >= 0 else ["eps"]
    return unfit


def rotation_of(a: Arguments) -> Arguments:
    """The given options of the rotation."""
    return {name: a[name] for name in ROTATION_DEFAULTS if a.get(name) is not None}


def _rotate(a: Arguments) -> list[Expected]:
    rows = a["cos"], a["sin"], a.get("position_ids")
    xs = [a[name] for name in ("x", "q", "k") if name in a]
    return [Expected(rounded_once(x, *rows, **rotation_of(a))) for x in xs]


def _quantize(a: Arguments) -> list[Expected]:
    """By the reference, in the dtype of the arithmetic."""
    wide = F64 if a["x"].dtype == F64 else torch.float32
    a |= {name: a[name].to(wide) for name in ("cos", "sin")}
    if a["x"].shape[-2] == 0 or a["x"].shape[:-2].numel() == 0:
        return [Expected(a[name].clone()) for name in ("x_out", "scale_out")]
    return [Expected(x) for x in reference.apply_rotary_quantize(**a)]


def _qkv(a: Arguments) -> list[Expected]:
    q, k, v = split_qkv(a["qkv"], a["kv_heads"])
    return [*_rotate({**a, "q": q, "k": k}), Expected(v)]


def _grads_of_parts(a: Arguments) -> list[torch.Tensor]:
    """Zeros for what is None."""
    names = ("grad_q", "grad_k", "grad_v")
    like = next(a[name] for name in names if a[name] is not None)
    if "qkv" in a:
        q_heads, kv_heads, _ = (x.shape[-2] for x in split_qkv(a["qkv"], a["kv_heads"]))
    else:
        q_heads, kv_heads = a["q_heads"], a["kv_heads"]
    return [
        like.new_zeros(*like.shape[:-2], heads, like.shape[-1]) if a[name] is None else a[name]
        for name, heads in zip(names, (q_heads, kv_heads, kv_heads), strict=True)
    ]


def _qkv_backward(a: Arguments) -> list[Expected]:
    q, k, v = _grads_of_parts(a)
    rows = a["cos"], a["sin"], a.get("position_ids")
    how = inverse_of({**ROTATION_DEFAULTS, **rotation_of(a)})
    q, k = (
        torch.zeros_like(x) if a[name] is None else rounded_once(x, *rows, **how)
        for name, x in (("grad_q", q), ("grad_k", k))
    )
    return [Expected(packed(q, k, v, a.get("by_group", False)))]


def _append(a: Arguments) -> list[Expected]:
    """By the reference, from the rotation's result rounded once."""
    rotated, k = (expected.value for expected in _rotate(a))
    q, *float8 = reference._as_float8(a["q"], rotated, *(a.get(n) for n in FLOAT8_Q))
    caches = [
        reference._stored(a[f"{x}_cache"], rows, a["slot_mapping"], a.get(f"{x}_scale"))
        for x, rows in (("k", k), ("v", a["v"]))
    ]
    return [Expected(x) for x in (q, k, *caches, *float8)]


def _normed_append(a: Arguments) -> list[Expected]:
    """By the operator that normalises, whose results have rows of their own."""
    return [Expected(x) for x in norm_then_append(**a)]


def _mla_append(a: Arguments) -> list[Expected]:
    wide = F64 if a["q"].dtype == F64 else torch.float32
    a |= {name: a[name].to(wide) for name in ("cos", "sin")}
    return [Expected(x) for x in reference.apply_rotary_mla_append(**a)]


def _at(a: Arguments) -> list[Expected]:
    """The rotation by the rows of cos_sin, in the dtype of the arithmetic."""
    ids = a.get("position_ids")
    if ids is None:
        ids = torch.arange(a["q"].shape[-3])
    rows = rope.cos_sin(
        a["inv_freq"],
        ids,
        a.get("axes"),
        attention_scaling=a.get("attention_scaling", 1.0),
        dtype=F64 if a["q"].dtype == F64 else torch.float32,
    )
    xs = {name: a[name] for name in ("q", "k")}
    return _rotate({**xs, "cos": rows[0], "sin": rows[1], **rotation_of(a)})


def _shift(a: Arguments) -> list[Expected]:
    """The keys, read and rotated by the rows of their distances, or of their new positions where
    the old ones are 0. Else by the reference: an angle is off by an ulp of the larger one at most.
    """
    cache, new = a["k_cache"], a.get("new_inv_freq")
    scaling = a.get("attention_scaling", 1.0)
    ordinary = math.isfinite(scaling) and scaling != 0 and a["inv_freq"].isfinite().all()
    if new is not None and (a["old_position_ids"].any() or not ordinary):
        return [_shift_between(a, cache)]
    wide = F64 if cache.dtype == F64 else torch.float32
    distance = a["new_position_ids"].double() - a["old_position_ids"].double()
    rows = rope.cos_sin(
        a["inv_freq"] if new is None else new,
        distance,
        attention_scaling=scaling,
        dtype=wide,
    )
    slots = a["slot_mapping"].long()
    keys = cache.flatten(0, 1).to(wide)[slots.clamp(min=0)]
    keys = reference.apply_rotary(keys, *rows, **rotation_of(a))
    stored = reference._stored(cache, keys, slots, None)
    return [Expected(reference._rotated_channels(stored, cache, rows[0], a["rotary_offset"]))]


def _shift_between(a: Arguments, cache: torch.Tensor) -> Expected:
    """In float64. Cos, sin, two products and a sum each round once, and so does an angle of each
    position.
    """
    slots = a["slot_mapping"].long()
    stored = slots >= 0
    new, old = (_angles(a | {"position_ids": a[f"{x}_position_ids"], "inv_freq": a[inv_freq]})[1]
                for x, inv_freq in (("new", "new_inv_freq"), ("old", "inv_freq")))  # fmt: skip
    scaling = a.get("attention_scaling", 1.0)
    rows = (new - old).cos() * scaling, (new - old).sin() * scaling
    exact = cache.flatten(0, 1).double()
    keys = exact[slots.clamp(min=0)]
    exact[slots[stored]] = reference.apply_rotary(keys, *rows, **rotation_of(a))[stored]
    if cache.dtype.itemsize == 1:
        limit = torch.finfo(cache.dtype).max
        exact = exact.clamp(-limit, limit)
    unit = 2.0**-53 if cache.dtype == F64 else 2.0**-24
    off = 4 * unit + (new.abs() + old.abs() + 4).amax(-1) * 2.0**-52
    allowed = torch.zeros_like(exact[..., :1])
    allowed[slots[stored]] = (2 * abs(scaling) * keys.abs().amax(-1) * off[:, None])[
        stored, :, None
    ]
    return Expected(exact.view(cache.shape), allowed.view(*cache.shape[:-1], 1), cache.dtype)


def _angles(a: Arguments, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [.., 1|P] and angles [.., P] in float64; NaN for angles out of range."""
    ids, axes = a.get("position_ids"), a.get("axes")
    if ids is None:
        ids = a.get("start", 0) + torch.arange(length)
    ids = ids.double()
    ids = ids.unsqueeze(-1) if axes is None else ids[axes.long()].movedim(0, -1)
    angles = ids * a["inv_freq"].double()
    reach = (ids.abs() < 2.0**53) & (angles.abs() < 2.0**50)
    return ids, angles.where(reach, torch.nan)


def _table(a: Arguments) -> list[Expected]:
    _, angles = _angles(a, a.get("length"))
    given, dtype = a["inv_freq"].dtype, a.get("dtype")
    dtype = dtype or (F64 if given == F64 else torch.float32)
    scaling = float(a.get("attention_scaling", 1.0))
    exact = [angles.cos() * scaling, angles.sin() * scaling]
    # The angle here is off by half an ulp of float64; its sine by as much, and by one ulp more.
    here = abs(scaling) * (angles.abs() + 2) * 2.0**-52
    return [Expected(x, 0.5 * ulp(x.nan_to_num(), dtype) + here, dtype) for x in exact]


def _table_backward(a: Arguments) -> list[Expected]:
    """Token by token through the reference, then summed. A term is a sum of two products; a sum of
    N of them is off by at most N units of the sum of their sizes.
    """
    cos, order, offsets = (a[name] for name in ("cos", "token_order", "row_offsets"))
    tokens, dtype = a["q"].shape[:-2], a["q"].dtype
    width = cos.shape[-1]
    leaves = [torch.zeros(*tokens, width, dtype=F64).requires_grad_() for _ in range(2)]
    sizes, heads = torch.zeros(tokens, dtype=F64), 0
    total = 0.0
    batched = a["q"].dim() == 4
    for x, grad in ((a["q"], a["grad_q"]), (a["k"], a["grad_k"])):
        if x is None:
            continue
        x, grad = x.double(), grad.double()
        if not batched:  # rows for each token are for [B, S, H, D]
            x, grad = x[None], grad[None]
        rows = leaves if batched else [leaf[None] for leaf in leaves]
        total = total + (reference.apply_rotary(x, *rows, **rotation_of(a)) * grad).sum()
        heads += x.shape[-2]
        if x.numel():
            both = 2 * x.abs().amax(-1) * grad.abs().amax(-1)
            sizes += both.sum(-1).view(tokens)
    terms = [torch.zeros_like(leaf) for leaf in leaves]
    if isinstance(total, torch.Tensor) and total.requires_grad:
        terms = torch.autograd.grad(total, leaves)
    terms = [t.reshape(-1, width) for t in (*terms, sizes.reshape(-1, 1).expand(-1, width))]
    if order is not None:
        parts = [order[i:j] for i, j in itertools.pairwise(offsets.tolist())]
        sums = [torch.stack([t[part].sum(0) for part in parts]) for t in terms]
        sums = [s.view(cos.shape) for s in sums]
    else:
        *batch, seq = tokens
        sums = [t.view(*batch, seq, width) for t in terms]
        if batch and (cos.dim() == 2 or cos.shape[0] == 1):
            sums = [t.sum(0, keepdim=cos.dim() == 3) for t in sums]
        if cos.dim() == 2:
            rest = cos.shape[0] - seq
            sums = [torch.nn.functional.pad(t, (0, 0, 0, rest)) for t in sums]
    unit = 2.0**-52 if dtype == F64 else 2.0**-23
    allowed = sums[2] * unit * (tokens.numel() * heads + 4)
    return [Expected(t, allowed, cos.dtype) for t in sums[:2]]


def _cos_sin_backward(a: Arguments) -> list[Expected]:
    grad_cos, grad_sin = a["grad_cos"].double(), a["grad_sin"].double()
    ids, angles = _angles(a, grad_cos.shape[0] if grad_cos.dim() else 0)
    scaling = a.get("attention_scaling", 1.0)
    by_angle = (angles.cos() * grad_sin - angles.sin() * grad_cos) * scaling * ids
    sizes = (grad_sin.abs() + grad_cos.abs()) * (angles.abs() + 8) * (scaling * ids).abs()
    pairs = angles.shape[-1]
    total, size = (t.reshape(-1, pairs).sum(0) for t in (by_angle, sizes))
    count = by_angle.numel() // pairs if pairs else 0
    return [Expected(total, size * (count + 4) * 2.0**-52, a["inv_freq"].dtype)]


def _normed(a: Arguments) -> tuple[Arguments, SimpleNamespace]:
    """The arguments in float64 as the arithmetic reads them, and the case of normed_inputs."""
    names = ("x",) if "x" in a else ("q", "k")
    weights = ("weight",) if "x" in a else ("q_weight", "k_weight")
    dtype = a[names[0]].dtype
    for name in ("cos", "sin") if dtype != F64 else ():
        a[name] = a[name].float()
    a = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
         for n, x in a.items()}  # fmt: skip
    how = {"eps": a.get("eps", 1e-6), "unit_offset": a.get("unit_offset", False)}
    case = SimpleNamespace(
        **how,
        names=names,
        dtype=dtype,
        all_heads=a[weights[0]].dim() == 2,
        options={**how, **rotation_of(a)},
        rows=(a["cos"], a["sin"], a.get("position_ids")),
        tensors=[a[n] for n in names],
        weights=[a[n] for n in weights],
    )
    return a, case


def _norm_and_rotate(case: SimpleNamespace, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The reference, on the tensors and then their weights."""
    count = len(tensors) // 2
    return [
        reference.rms_norm_rotary(x, weight, *case.rows, **case.options)
        for x, weight in zip(tensors[:count], tensors[count:], strict=True)
    ]


def _rms_norm(a: Arguments) -> list[Expected]:
    a, case = _normed(a)
    exact = _norm_and_rotate(case, [*case.tensors, *case.weights])
    out = []
    for value, x, weight in zip(exact, case.tensors, case.weights, strict=True):
        n, _, factor = normalised(x, weight, case)
        size = sizes_of(n * factor, weight, case.rows, case)
        out.append(Expected(value, roundings(case, x) * size, case.dtype))
    return out


def _rms_norm_backward(a: Arguments) -> list[Expected]:
    """Bounds as in test_rms_norm_rotary.py."""
    weight_dtype = a["weight" if "x" in a else "q_weight"].dtype
    a, case = _normed(a)
    leaves = [t.detach().requires_grad_() for t in (*case.tensors, *case.weights)]
    results = _norm_and_rotate(case, leaves)
    seeds = [torch.zeros_like(y) if a.get(f"grad_{x}") is None else a[f"grad_{x}"]
             for x, y in zip(case.names, results, strict=True)]  # fmt: skip
    exact = torch.autograd.grad(results, leaves, seeds, materialize_grads=True)
    how = {**ROTATION_DEFAULTS, **rotation_of(a)}
    order = how["interleaved"] if how["interleaved_out"] is None else how["interleaved_out"]
    how |= {"inverse": not how["inverse"]}
    how |= {"interleaved": order, "interleaved_out": how["interleaved"]}
    cos, sin, ids = case.rows
    out: list[list[Expected]] = [[], []]
    for i, (x, weight) in enumerate(zip(case.tensors, case.weights, strict=True)):
        seed = seeds[i].abs()
        n, inverse_rms, factor = (t.abs() for t in normalised(x, weight, case))
        both = [reference.apply_rotary(seed, cos.abs(), sign * sin.abs(), ids, **how).abs()
                for sign in (1, -1)]  # fmt: skip
        g = torch.maximum(*both)
        row = (-1,) if weight.dim() == 1 else (-2, -1)
        size = inverse_rms * (g * factor + n * (n * g * factor).mean(row, keepdim=True))
        rounding = 2 * roundings(case, x) + 8 * 2.0**-24 * (case.dtype != F64)
        out[0].append(Expected(exact[i], 2 * rounding * size, case.dtype))
        terms = x.numel() // max(weight.numel(), 1)
        unit = 2.0**-24 if case.dtype != F64 else 2.0**-52
        summed = tuple(range(x.dim() - weight.dim()))
        allowed = (rounding + terms * unit) * (n * g).sum(summed)
        out[1].append(Expected(exact[len(seeds) + i], allowed, weight_dtype))
    return [*out[0], *out[1]]


def _of_parts(a: Arguments) -> Arguments:
    """The same call with q and k."""
    q, k, _ = split_qkv(a["qkv"], a["kv_heads"])
    return {**{n: x for n, x in a.items() if n not in ("qkv", "kv_heads")}, "q": q, "k": k}


def _rms_norm_qkv(a: Arguments) -> list[Expected]:
    return [*_rms_norm(_of_parts(a)), Expected(split_qkv(a["qkv"], a["kv_heads"])[2])]


def _rms_norm_qkv_backward(a: Arguments) -> list[Expected]:
    dtype, by_group = a["qkv"].dtype, a["kv_heads"] is None
    v = _grads_of_parts(a)[2].double()
    to_q, to_k, *to_weights = _rms_norm_backward(_of_parts(a))
    value = packed(to_q.value, to_k.value, v, by_group)
    allowed = packed(to_q.allowed, to_k.allowed, torch.zeros_like(v), by_group)
    return [Expected(value, allowed, dtype), *to_weights]


RESULTS_OF: dict[str, Callable[[Arguments], list[Expected]]] = {
    "apply_rotary": _rotate,
    "apply_rotary_qk": _rotate,
    "apply_rotary_quantize": _quantize,
    "apply_rotary_qkv": _qkv,
    "apply_rotary_qkv_backward": _qkv_backward,
    "apply_rotary_qk_append_kv": _append,
    "rms_norm_rotary_qk_append_kv": _normed_append,
    "apply_rotary_mla_append": _mla_append,
    "apply_rotary_qk_at": _at,
    "shift_cached_k": _shift,
    "cos_sin_cache": _table,
    "cos_sin": _table,
    "cos_sin_backward": _cos_sin_backward,
    "apply_rotary_table_backward": _table_backward,
    "rms_norm_rotary": _rms_norm,
    "rms_norm_rotary_backward": _rms_norm_backward,
    "rms_norm_rotary_qk": _rms_norm,
    "rms_norm_rotary_qk_backward": _rms_norm_backward,
    "rms_norm_rotary_qkv": _rms_norm_qkv,
    "rms_norm_rotary_qkv_backward": _rms_norm_qkv_backward,
}
