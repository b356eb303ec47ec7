"""Valid calls of every operator, from a seed: the arguments by their names in its schema."""

from collections.abc import Callable

import torch
from random_arguments import (
    ORDERS,
    PAIRS,
    Arguments,
    Draw,
    cache,
    frequencies,
    options,
    positions,
    rotated,
    rows,
    scales,
    slots,
    with_axes,
)
from support import DTYPES, FLOAT8

from rope_ext._operators import OPERATORS
from rope_ext.reference import split_qkv

rope = torch.ops.rope

# Arguments with any strides, and those that have to be contiguous. All others have a last stride of
# 1.
ANY_STRIDES = {"inv_freq", "new_inv_freq", "old_position_ids", "new_position_ids",
               "position_ids", "axes", "slot_mapping", "k_scale", "v_scale", "scale",
               "q_scale", "q_scale_out", "scale_out", "grad_cos", "grad_sin"}  # fmt: skip
CONTIGUOUS = {"token_order", "row_offsets"}


def apply_rotary(d: Draw, *names: str, reorders: bool = True) -> Arguments:
    xs, pairs = rotated(d, *names)
    x = xs[names[0]]
    return {**xs, **rows(d, x, pairs), **options(d, x, pairs, reorders=reorders)}


def into_out(d: Draw, call: Arguments, *names: str) -> Arguments:
    outs = ("out",) if len(names) == 1 else ("out_q", "out_k")
    return {**call, **{o: d.tensor(*call[x].shape).to(call[x]) for o, x in zip(outs, names)}}  # noqa: B905


def quantize(d: Draw) -> Arguments:
    call = apply_rotary(d, "x")
    *heads, channels = call["x"].shape
    group_size = d.choice([n for n in range(1, channels + 1) if channels % n == 0])
    return {
        **call,
        "group_size": group_size,
        "eps": d.choice((1e-10, 1e-4, 2.0)),
        "power_of_two_scales": d.choice((False, True)),
        "x_out": d.tensor(*heads, channels).to(d.choice(FLOAT8)),
        "scale_out": d.tensor(*heads, channels // group_size),
    }


def float8_q(d: Draw, q: torch.Tensor) -> Arguments:
    """Where q goes as float8, with a scale or scales of its own; or nothing."""
    if d.chance(0.5):
        return {}
    out = {"q_out": d.tensor(*q.shape).to(d.choice(FLOAT8))}
    scale = d.choice((None, "one", "a head", "own"))
    if scale == "own":
        out["q_scale_out"] = d.tensor(*q.shape[:-1])
    elif scale is not None:
        heads = q.shape[-2] if scale == "a head" else 1
        out["q_scale"] = d.tensor(heads).abs() + 0.01
    return out


def append_kv(d: Draw) -> Arguments:
    xs, pairs = rotated(d, "q", "k")
    q, k = xs["q"], xs["k"]
    pages, slot_mapping = slots(d, q)
    k_cache = cache(d, *pages, *k.shape[-2:], dtype=q.dtype)
    how = options(d, q, pairs, reorders=False)
    del how["interleaved_out"]
    return {
        **xs,
        "v": d.tensor(*k.shape, dtype=k.dtype),
        "k_cache": k_cache,
        "v_cache": d.tensor(*k_cache.shape).to(k_cache.dtype),
        "slot_mapping": slot_mapping,
        **rows(d, q, pairs),
        **scales(d, k_cache, k.shape[-2], "k_scale", "v_scale"),
        **float8_q(d, q),
        **how,
    }


def normed_append(d: Draw) -> Arguments:
    call = append_kv(d)
    return {**call, **norm(d, call, "q", "k"), "norm_v": d.choice((False, True))}


def mla_append(d: Draw) -> Arguments:
    xs, pairs = rotated(d, "q")
    q = xs["q"]
    tokens = q.shape[:-2]
    one_head = d.choice(((*tokens, 2 * pairs), (*tokens, 1, 2 * pairs)))
    rank = d.choice((1, 3, 8, 16, 33))
    pages, slot_mapping = slots(d, q)
    kv_cache = cache(d, *pages, rank + 2 * pairs, dtype=q.dtype)
    how = options(d, q, pairs, reorders=True)
    return {
        "q": q,
        "k_pe": d.tensor(*one_head, dtype=q.dtype),
        "kv_c": d.tensor(*tokens, rank, dtype=q.dtype),
        "kv_cache": kv_cache,
        "slot_mapping": slot_mapping,
        **rows(d, q, pairs, by_channel=False),
        **scales(d, kv_cache, 1, "scale"),
        **float8_q(d, q),
        **{name: how[name] for name in ORDERS},
    }


def cos_sin_cache(d: Draw) -> Arguments:
    return {
        "inv_freq": frequencies(d, d.choice(PAIRS)),
        "length": d.size(20),
        "start": d.choice((0, -7, 10**6, 2**31 - 30)),
        "attention_scaling": d.choice((1.0, 0.707, -3.5)),
        "dtype": d.choice((None, *DTYPES)),
    }


def cos_sin(d: Draw) -> Arguments:
    pairs = d.choice(PAIRS)
    shape = tuple(d.size(5) for _ in range(d.randint(0, 3)))
    return {
        "inv_freq": frequencies(d, pairs),
        **with_axes(d, shape, pairs),
        "attention_scaling": d.choice((1.0, 0.707, -3.5)),
        "dtype": d.choice((None, *DTYPES)),
    }


def cos_sin_backward(d: Draw) -> Arguments:
    pairs = d.choice(PAIRS)
    out: Arguments = {"inv_freq": frequencies(d, pairs), "attention_scaling": d.choice((1.0, -3.5))}
    if d.chance(0.3):
        shape = (d.size(150),)
        out |= {"position_ids": None, "axes": None, "start": d.choice((0, -7, 10**6))}
    else:
        shape = tuple(d.size(9) for _ in range(d.randint(0, 3)))
        out |= with_axes(d, shape, pairs)
    dtype = d.choice(DTYPES)
    grads = {name: d.tensor(*shape, pairs, dtype=dtype) for name in ("grad_cos", "grad_sin")}
    return {**grads, **out}


def table_backward(d: Draw) -> Arguments:
    call = apply_rotary(d, "q", "k")
    ids = call.pop("position_ids")
    del call["sin"]
    if d.chance(0.3):
        call["k"] = None
    grads = {f"grad_{x}": None if call[x] is None else d.tensor(*call[x].shape).to(call[x])
             for x in "qk"}  # fmt: skip
    call |= {**grads, "token_order": None, "row_offsets": None}
    if ids is not None:
        flat = ids.expand(call["q"].shape[:-2]).flatten()
        in_order, order = torch.sort(flat.long(), stable=True)
        each_row = torch.arange(call["cos"].shape[0] + 1)
        call |= {"token_order": order, "row_offsets": torch.searchsorted(in_order, each_row)}
    return call


def rotary_at(d: Draw, *, reorders: bool) -> Arguments:
    xs, pairs = rotated(d, "q", "k")
    q = xs["q"]
    *batch, seq = q.shape[:-2]
    where: Arguments = {"position_ids": None, "axes": None}
    if d.chance(0.8):
        shape = d.choice(((seq,), (1, seq), (*batch, seq))) if batch else (seq,)
        where = with_axes(d, shape, pairs)
    return {
        **xs,
        "inv_freq": frequencies(d, pairs),
        **where,
        "attention_scaling": d.choice((1.0, 1.0, 0.707)),
        **options(d, q, pairs, reorders=reorders),
    }


def norm(d: Draw, call: Arguments, *names: str) -> Arguments:
    """Weights and options for the tensors of a call."""
    dtype = d.choice((call[names[0]].dtype, torch.float32))
    last = 2 if d.chance(0.3) else 1  # all heads together, or each by itself
    shapes = {"weight" if x == "x" else f"{x}_weight": call[x].shape[-last:] for x in names}
    weights = {name: d.tensor(*shape, dtype=dtype) for name, shape in shapes.items()}
    return {**weights, "eps": d.choice((1e-6, 1e-5, 0.5)), "unit_offset": d.choice((False, True))}


def packed(d: Draw) -> Arguments:
    """qkv in place of x, flat or by group."""
    call = apply_rotary(d, "x")
    x, kv_heads, of_k = call.pop("x"), d.choice((1, 2, 3)), d.choice((1, 2, 4))
    by_group = d.chance(0.5)
    heads = (kv_heads, of_k + 2) if by_group else (kv_heads * (of_k + 2),)
    qkv = d.tensor(*x.shape[:-2], *heads, x.shape[-1], dtype=x.dtype)
    return {"qkv": qkv, **call, "kv_heads": None if by_group else kv_heads}


def gradients_of_parts(d: Draw, qkv: torch.Tensor, kv_heads: int | None) -> Arguments:
    """Of q, k and v; two of them may be None."""
    missing = d.sample(("q", "k", "v"), d.choice((0, 0, 1, 2)))
    parts = zip("qkv", split_qkv(qkv, kv_heads), strict=True)
    return {f"grad_{name}": None if name in missing else d.tensor(*x.shape).to(x)
            for name, x in parts}  # fmt: skip


def qkv_backward(d: Draw) -> Arguments:
    call = packed(d)
    qkv, kv_heads = call.pop("qkv"), call.pop("kv_heads")
    q, k, _ = split_qkv(qkv, kv_heads)
    heads = {"q_heads": q.shape[-2], "kv_heads": k.shape[-2], "by_group": kv_heads is None}
    return {**gradients_of_parts(d, qkv, kv_heads), **call, **heads}


def packed_rms_norm(d: Draw) -> Arguments:
    call = packed(d)
    qkv, by_group = call["qkv"], call["kv_heads"] is None
    dtype, all_heads = d.choice((qkv.dtype, torch.float32)), not by_group and d.chance(0.3)
    for name, x in zip("qk", split_qkv(qkv, call["kv_heads"]), strict=False):
        shape = x.shape[-2:] if all_heads else x.shape[-1:]
        call[f"{name}_weight"] = d.tensor(*shape, dtype=dtype)
    return {**call, "eps": d.choice((1e-6, 1e-5, 0.5)), "unit_offset": d.choice((False, True))}


def packed_rms_norm_backward(d: Draw) -> Arguments:
    call = packed_rms_norm(d)
    return {**gradients_of_parts(d, call["qkv"], call["kv_heads"]), **call}


def rms_norm(d: Draw, *names: str, reorders: bool = True) -> Arguments:
    call = apply_rotary(d, *names, reorders=reorders)
    return {**call, **norm(d, call, *names)}


def rms_norm_backward(d: Draw, *names: str) -> Arguments:
    call = rms_norm(d, *names)
    missing = d.choice((None, None, "q", "k"))
    grads = {f"grad_{x}": None if x == missing else d.tensor(*call[x].shape).to(call[x])
             for x in names}  # fmt: skip
    return {**grads, **call}


def shift_cached_k(d: Draw) -> Arguments:
    """If the frequencies change, from position 0: then the bits are those of the new angle."""
    keys, pairs = rotated(d, "q")
    k = keys["q"]
    pages, slot_mapping = slots(d, k)
    count = slot_mapping.numel()
    how = options(d, k, pairs, reorders=False)
    old, changes = positions(d, (count,)), d.chance(0.5)
    return {
        "k_cache": cache(d, *pages, *k.shape[-2:], dtype=k.dtype),
        "slot_mapping": slot_mapping.flatten(),
        "old_position_ids": torch.zeros_like(old) if changes else old,
        "new_position_ids": positions(d, (count,)),
        "inv_freq": frequencies(d, pairs),
        "new_inv_freq": frequencies(d, pairs) if changes else None,
        "attention_scaling": d.choice((1.0, 1.0, 0.707)),
        **{name: how[name] for name in ("rotary_offset", "interleaved")},
    }


CALLS: dict[str, Callable[[Draw], Arguments]] = {
    "rope::apply_rotary": lambda d: apply_rotary(d, "x"),
    "rope::apply_rotary_": lambda d: apply_rotary(d, "x", reorders=False),
    "rope::apply_rotary.out": lambda d: into_out(d, apply_rotary(d, "x"), "x"),
    "rope::apply_rotary_qk": lambda d: apply_rotary(d, "q", "k"),
    "rope::apply_rotary_qk_": lambda d: apply_rotary(d, "q", "k", reorders=False),
    "rope::apply_rotary_qk.out": lambda d: into_out(d, apply_rotary(d, "q", "k"), "q", "k"),
    "rope::apply_rotary_quantize": quantize,
    "rope::apply_rotary_qkv": packed,
    "rope::apply_rotary_qkv_backward": qkv_backward,
    "rope::apply_rotary_qk_append_kv_": append_kv,
    "rope::rms_norm_rotary_qk_append_kv_": normed_append,
    "rope::apply_rotary_mla_append_": mla_append,
    "rope::shift_cached_k_": shift_cached_k,
    "rope::cos_sin_cache": cos_sin_cache,
    "rope::cos_sin": cos_sin,
    "rope::cos_sin_backward": cos_sin_backward,
    "rope::apply_rotary_table_backward": table_backward,
    "rope::apply_rotary_qk_at": lambda d: rotary_at(d, reorders=True),
    "rope::apply_rotary_qk_at_": lambda d: rotary_at(d, reorders=False),
    "rope::rms_norm_rotary": lambda d: rms_norm(d, "x"),
    "rope::rms_norm_rotary_": lambda d: rms_norm(d, "x", reorders=False),
    "rope::rms_norm_rotary.out": lambda d: into_out(d, rms_norm(d, "x"), "x"),
    "rope::rms_norm_rotary_backward": lambda d: rms_norm_backward(d, "x"),
    "rope::rms_norm_rotary_qk": lambda d: rms_norm(d, "q", "k"),
    "rope::rms_norm_rotary_qk_": lambda d: rms_norm(d, "q", "k", reorders=False),
    "rope::rms_norm_rotary_qk.out": lambda d: into_out(d, rms_norm(d, "q", "k"), "q", "k"),
    "rope::rms_norm_rotary_qk_backward": lambda d: rms_norm_backward(d, "q", "k"),
    "rope::rms_norm_rotary_qkv": packed_rms_norm,
    "rope::rms_norm_rotary_qkv_backward": packed_rms_norm_backward,
}
RECORDS = {operator.op: operator for operator in OPERATORS}


def registered() -> set[str]:
    """The operators that the dispatcher has, with the names of their overloads."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rope::")}


def call_operator(name: str, arguments: Arguments) -> object:
    """Passes arguments by position if the schema has no keyword."""
    operator, given = RECORDS[name], dict(arguments)
    positional = [given.pop(n, operator.defaults[n]) for n in operator.positional]
    return operator.overload(*positional, **given)


def described(arguments: Arguments) -> str:
    """The case in one line."""

    def text(x: object) -> str:
        if not isinstance(x, torch.Tensor):
            return repr(x)
        dtype = str(x.dtype).removeprefix("torch.")
        if x.layout != torch.strided or x.is_nested:
            return f"{dtype} {'nested' if x.is_nested else x.layout}"
        return f"{dtype}{list(x.shape)} by {list(x.stride())}"

    return ", ".join(f"{name}={text(x)}" for name, x in arguments.items())
