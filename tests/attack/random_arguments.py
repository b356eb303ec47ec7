"""Arguments that fit each other, drawn from a seed; shared by the calls of several operators."""

import inspect
import random

import torch
from support import DTYPES, FLOAT8

from rope_ext.options import rotation_options

Arguments = dict[str, object]

KEYWORDS = inspect.signature(rotation_options).parameters
ROTATION_DEFAULTS: Arguments = {name: keyword.default for name, keyword in KEYWORDS.items()}
ORDERS = ("interleaved", "interleaved_out")

PAIRS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 19, 23, 24, 31, 32, 33, 40, 64)  # tails of vectors
MANY = 2**20  # larger tensors are expanded from one element


class Draw(random.Random):
    """Random choices and tensors from a seed."""

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
    """Tensors [*tokens, heads, D] of one dtype, and the number of pairs that rotate."""
    tokens = (d.size(3), 300 if d.chance(0.005) else d.size(6))  # 300: for several threads
    if d.chance(0.02):  # empty, with a size too large for a loop
        tokens = d.choice(((0, 2**40), (2**40, 0)))
    tokens = tokens[1:] if tokens[1] < MANY and d.chance(0.25) else tokens
    pairs = d.choice(PAIRS)
    dim = 2 * pairs + d.choice((0, 0, 0, 1, 2, 3, 5, 8, 17))
    dtype = d.choice(DTYPES)
    return {name: d.tensor(*tokens, d.size(4), dim, dtype=dtype) for name in names}, pairs


def options(d: Draw, x: torch.Tensor, pairs: int, *, reorders: bool) -> Arguments:
    interleaved = d.choice((False, True))
    others = (None, False, True) if reorders else (None, interleaved)
    flags = [name for name, default in ROTATION_DEFAULTS.items() if default is False]
    return {
        "rotary_offset": d.randint(0, x.shape[-1] - 2 * pairs),
        "interleaved": interleaved,
        "interleaved_out": d.choice(others),
        **{flag: d.choice((False, True)) for flag in flags if flag not in ORDERS},
    }


def rows(d: Draw, x: torch.Tensor, pairs: int, *, by_channel: bool = True) -> Arguments:
    """cos and sin, and sometimes position_ids and rotary_dim."""
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
    """Positions of angles, of every allowed dtype."""
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
    """The number of blocks, their size, and a unique slot for each token of x [*tokens, H, D]."""
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
