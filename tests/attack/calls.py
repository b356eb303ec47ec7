"""Calls that fit, of every operator: the arguments by the names of its schema, drawn from a seed."""

import random
from collections.abc import Callable

import torch
from support import DTYPES, FLOAT8

rope = torch.ops.rope

Arguments = dict[str, object]

PAIRS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 19, 23, 24, 31, 32, 33, 40, 64)  # tails of vectors
MANY = 2**20  # more elements than this are one, expanded

# What may have any strides; and what has to be contiguous. All else has a last stride of 1.
ANY_STRIDES = {"inv_freq", "position_ids", "axes", "slot_mapping", "k_scale", "v_scale", "scale",
               "grad_cos", "grad_sin"}  # fmt: skip
CONTIGUOUS = {"token_order", "row_offsets"}


class Draw(random.Random):
    """Choices and tensors, of a seed."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(self.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self, most: int) -> int:
        return 0 if self.chance(0.05) else self.randint(1, most)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if torch.Size(shape[:-1]).numel() > MANY:
            shape, full = (*(min(size, 1) for size in shape[:-1]), shape[-1]), shape
            return self.tensor(*shape, dtype=dtype).expand(full)
        return torch.randn(shape, generator=self.generator).to(dtype)

    def indices(self, *shape: int, below: int, dtype: torch.dtype) -> torch.Tensor:
        if torch.Size(shape).numel() > MANY:
            return self.indices(below=below, dtype=dtype).expand(shape)
        return torch.randint(0, max(below, 1), shape, generator=self.generator, dtype=dtype)

    def index_dtype(self) -> torch.dtype:
        return self.choice((torch.int32, torch.int64))


# ---- parts of arguments


def rotated(d: Draw, *names: str) -> tuple[Arguments, int]:
    """Tensors [*tokens, heads, D] of one dtype, and how many pairs of their channels rotate."""
    tokens = (d.size(3), 300 if d.chance(0.01) else d.size(6))  # 300: for several threads
    if d.chance(0.02):  # nothing, at a size that no loop comes to an end of
        tokens = d.choice(((0, 2**40), (2**40, 0)))
    tokens = tokens[1:] if tokens[1] < MANY and d.chance(0.25) else tokens
    pairs = d.choice(PAIRS)
    dim = 2 * pairs + d.choice((0, 0, 0, 1, 2, 3, 5, 8, 17))
    dtype = d.choice(DTYPES)
    return {name: d.tensor(*tokens, d.size(4), dim, dtype=dtype) for name in names}, pairs


def options(d: Draw, x: torch.Tensor, pairs: int, *, reorders: bool) -> Arguments:
    interleaved = d.choice((False, True))
    others = (None, False, True) if reorders else (None, interleaved)
    return {
        "rotary_offset": d.randint(0, x.shape[-1] - 2 * pairs),
        "interleaved": interleaved,
        "interleaved_out": d.choice(others),
        "inverse": d.choice((False, True)),
    }


def rows(d: Draw, x: torch.Tensor, pairs: int, *, by_channel: bool = True) -> Arguments:
    """cos and sin, and what may come with them: position_ids, rotary_dim."""
    *batch, seq = x.shape[:-2]
    out: Arguments = {}
    width = pairs
    if by_channel and d.chance(0.4):
        out["rotary_dim"] = 2 * pairs
        width = d.choice((pairs, 2 * pairs))
    form = d.choice(("table", "positions", "positions", "rows"))
    if form == "positions" or (seq > MANY and form == "table"):
        shape = (d.randint(1, 12), width)
        ids = d.choice(((seq,), (1, seq), (*batch, seq))) if batch else (seq,)
        out["position_ids"] = d.indices(*ids, below=shape[0], dtype=d.index_dtype())
    elif form == "table" or not batch:
        shape = (seq + d.randint(0, 3), width)
    else:
        shape = (d.choice((1, *batch)), seq, width)
    dtype = d.choice(DTYPES)
    return {
        "cos": d.tensor(*shape, dtype=dtype),
        "sin": d.tensor(*shape, dtype=dtype),
        "position_ids": None,
        **out,
    }


def positions(d: Draw, shape: tuple[int, ...]) -> torch.Tensor:
    """Positions of angles, of every dtype that these may have."""
    if torch.Size(shape).numel() > MANY:
        return positions(d, (1,) * len(shape)).expand(shape)
    dtype = d.choice((torch.int32, torch.int64, *DTYPES))
    far = d.choice((2**4, 2**11, 2**20, 2**31 - 1)) if dtype.itemsize > 2 else 2**4
    ids = d.indices(*shape, below=far, dtype=torch.int64) - d.choice((0, far // 2))
    return ids.to(dtype) + (0.25 if dtype.is_floating_point else 0)


def frequencies(d: Draw, pairs: int) -> torch.Tensor:
    return (1 / (1 + d.indices(pairs, below=9999, dtype=torch.int64))).to(d.choice(DTYPES))


def with_axes(d: Draw, shape: tuple[int, ...], pairs: int) -> Arguments:
    if d.chance(0.6):
        return {"position_ids": positions(d, shape), "axes": None}
    count = d.randint(1, 4)
    axes = d.indices(pairs, below=count, dtype=d.index_dtype())
    return {"position_ids": positions(d, (count, *shape)), "axes": axes}


def slots(d: Draw, x: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor]:
    """Blocks and their size, and a slot of each token of x [*tokens, H, D]: none twice."""
    tokens = x.shape[:-2]
    count = 0 if tokens.numel() == 0 else tokens.numel()
    block_size = d.randint(1, 5)
    blocks = count // block_size + d.randint(1, 2)
    order = torch.randperm(blocks * block_size, generator=d.generator)[:count]
    order[d.indices(count, below=4, dtype=torch.int64) == 0] = d.choice((-1, -(2**31)))
    shape = d.choice((tokens, (count,)))
    if tokens.numel() == 0 and max(tokens) > MANY:
        shape = tokens
    return (blocks, block_size), order.to(d.index_dtype()).view(shape)


def scales(d: Draw, cache: torch.Tensor, heads: int, *names: str) -> Arguments:
    if cache.dtype not in FLOAT8:
        return {}
    shapes = [(), (1,)] + ([(heads,)] if len(names) > 1 else [])
    given = {name: d.tensor(*d.choice(shapes)).abs() + 0.01 for name in names}
    return {name: scale for name, scale in given.items() if d.chance(0.7)}


def cache(d: Draw, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return d.tensor(*shape).to(d.choice((dtype, *FLOAT8)))


# ---- the operators


def apply_rotary(d: Draw, *names: str, reorders: bool = True) -> Arguments:
    xs, pairs = rotated(d, *names)
    x = xs[names[0]]
    return {**xs, **rows(d, x, pairs), **options(d, x, pairs, reorders=reorders)}


def into_out(d: Draw, *names: str) -> Arguments:
    out = apply_rotary(d, *names)
    outs = ("out",) if len(names) == 1 else ("out_q", "out_k")
    return {**out, **{o: d.tensor(*out[x].shape).to(out[x]) for o, x in zip(outs, names)}}  # noqa: B905


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
        **how,
    }


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
        **{name: how[name] for name in ("interleaved", "interleaved_out")},
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


def rms_norm(d: Draw) -> Arguments:
    call = apply_rotary(d, "q", "k")
    dtype = d.choice((call["q"].dtype, torch.float32))
    all_heads = d.chance(0.3)
    for x in "qk":
        heads, dim = call[x].shape[-2:]
        call[f"{x}_weight"] = d.tensor(*((heads, dim) if all_heads else (dim,)), dtype=dtype)
    return {**call, "eps": d.choice((1e-6, 1e-5, 0.5)), "unit_offset": d.choice((False, True))}


def rms_norm_backward(d: Draw) -> Arguments:
    call = rms_norm(d)
    missing = d.choice((None, None, "q", "k"))
    grads = {f"grad_{x}": None if x == missing else d.tensor(*call[x].shape).to(call[x])
             for x in "qk"}  # fmt: skip
    return {**grads, **call}


CALLS: dict[str, Callable[[Draw], Arguments]] = {
    "rope::apply_rotary": lambda d: apply_rotary(d, "x"),
    "rope::apply_rotary_": lambda d: apply_rotary(d, "x", reorders=False),
    "rope::apply_rotary.out": lambda d: into_out(d, "x"),
    "rope::apply_rotary_qk": lambda d: apply_rotary(d, "q", "k"),
    "rope::apply_rotary_qk_": lambda d: apply_rotary(d, "q", "k", reorders=False),
    "rope::apply_rotary_qk.out": lambda d: into_out(d, "q", "k"),
    "rope::apply_rotary_qk_append_kv_": append_kv,
    "rope::apply_rotary_mla_append_": mla_append,
    "rope::cos_sin_cache": cos_sin_cache,
    "rope::cos_sin": cos_sin,
    "rope::cos_sin_backward": cos_sin_backward,
    "rope::apply_rotary_table_backward": table_backward,
    "rope::apply_rotary_qk_at": lambda d: rotary_at(d, reorders=True),
    "rope::apply_rotary_qk_at_": lambda d: rotary_at(d, reorders=False),
    "rope::rms_norm_rotary_qk": rms_norm,
    "rope::rms_norm_rotary_qk_backward": rms_norm_backward,
}
OPERATORS = list(CALLS)


def registered() -> set[str]:
    """The operators that the dispatcher has, with the names of their overloads."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rope::")}


def overload_of(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.removeprefix("rope::").partition(".")
    return getattr(getattr(rope, packet), overload or "default")


def call_operator(name: str, arguments: Arguments) -> object:
    """By position where the schema has no keyword; what is not given is left out."""
    overload = overload_of(name)
    arguments = dict(arguments)
    positional = [
        arguments.pop(a.name, a.default_value)
        for a in overload._schema.arguments
        if not a.kwarg_only
    ]
    return overload(*positional, **arguments)


def written(name: str) -> list[str]:
    """The arguments that an operator writes."""
    arguments = overload_of(name)._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def described(arguments: Arguments) -> str:
    """What makes the case, in one line."""

    def text(x: object) -> str:
        if not isinstance(x, torch.Tensor):
            return repr(x)
        dtype = str(x.dtype).removeprefix("torch.")
        if x.layout != torch.strided or x.is_nested:
            return f"{dtype} {'nested' if x.is_nested else x.layout}"
        return f"{dtype}{list(x.shape)} by {list(x.stride())}"

    return ", ".join(f"{name}={text(x)}" for name, x in arguments.items())
