"""The rotation, to the last bit: every kind of table, positions, dtype and size."""

from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    assert_near_exact,
    assert_same_bits,
    in_layout,
    inverse_of,
    name_of,
    naming,
    on_cpu,
    random,
    random_positions,
    random_table,
    rounded_once,
)

import rope_ext
from rope_ext import _C

rope = torch.ops.rope

B, S, L = 2, 5, 11
F64, F32, F16, BF16 = DTYPES


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    H: int = 4
    K: int | None = 2  # heads of k; None: q alone
    S: int = S
    D: int = 16
    R: int | None = None  # rotary_dim as given
    W: int | None = None  # width of the table; None: half of R or D
    dtype: torch.dtype = F32
    table_dtype: torch.dtype = F32
    table: str = "table"  # or "exact table" (L = S), "one for all" [1, S, W], "per token" [B, S, W]
    ids: str | None = None  # "S", "1S", "BS", "T"
    ids_dtype: torch.dtype = torch.int64
    interleaved: bool = False
    interleaved_out: bool | None = None
    inverse: bool = False
    offset: int = 0  # rotary_offset
    layout: str = "bshd"


CASES = [
    # models
    Case("llama", "grouped heads, half-split", D=64),
    Case("llama bf16 decode", "positions of its own for each sequence", D=64, dtype=BF16, ids="BS"),
    Case("mha", "as many heads of k", K=4, D=64, dtype=F16),
    Case("more k than q", "nothing says that k has fewer heads", H=2, K=6),
    Case("gpt-j", "interleaved, a part of the channels", D=64, R=32, interleaved=True, dtype=F16),
    Case("gpt-neox", "a quarter of the channels rotates", D=64, R=16, K=4),
    Case("deepseek", "k is one shared head", H=8, K=1, D=64, interleaved=True, dtype=BF16),
    Case("vision", "rows from two axes, packed patches", D=80, layout="thd", table="exact table"),
    # layouts
    Case("sbhd", "as Megatron has it", layout="sbhd", interleaved=True),
    Case("thd", "packed sequences, positions from their lengths", layout="thd", ids="T"),
    # positions
    Case("ids S int32", "as servers keep them", ids="S", ids_dtype=torch.int32),
    Case("ids 1S", "as transformers passes them", ids="1S", ids_dtype=torch.int32, dtype=BF16),
    Case("ids BS q alone", "one tensor", ids="BS", K=None),
    Case("ids T int32", "packed", ids="T", ids_dtype=torch.int32, layout="thd", dtype=BF16),
    Case("ids with sbhd", "the layout does not turn position_ids", ids="BS", layout="sbhd"),
    # tables
    Case("exact table", "no row to spare", table="exact table"),
    Case("one row for all", "rows of the step, [1, S, P]", table="one for all", dtype=BF16),
    Case("a row per token, decoding", "sequences of one token", S=1, table="per token", D=64),
    Case("ids, decoding", "sequences of one token", S=1, ids="BS", D=64),
    Case("a row per token, sbhd", "rows are [B, S] anywhere", table="per token", layout="sbhd"),
    Case("per token bf16", "rows as a model in bf16 makes them", table="per token", dtype=BF16,
         table_dtype=BF16, D=64),
    # full width: one angle a channel
    Case("full width", "tables as transformers makes them, R wide", R=16, W=16),
    Case("full width, partial", "unequal halves, channels left over", D=24, R=16, W=16),
    Case("full width, interleaved", "neighbours with different angles", R=16, W=16,
         interleaved=True),
    Case("full width, inverse", "the transpose, not the inverse matrix", R=16, W=16, inverse=True),
    Case("full width, inverse, interleaved", "the same, neighbours", R=16, W=16, inverse=True,
         interleaved=True, dtype=BF16),
    Case("full width, rows", "per token, R wide", R=16, W=16, table="per token", dtype=F16),
    Case("full width, ids", "looked up", R=16, W=16, ids="BS", table_dtype=BF16),
    # the last channels, or some in the middle
    Case("last channels, interleaved", "as DeepSeek-V2 has them", K=1, D=192, R=64, offset=128,
         interleaved=True, dtype=BF16, ids="BS"),
    Case("middle", "channels before and after, no vector aligned", D=29, R=16, offset=5,
         layout="bhsd"),
    Case("middle, rotary_dim from the table", "R is 2 W, where it begins is said", D=20, W=6,
         offset=3, dtype=F16),
    Case("middle, full width, inverse", "everything counts from the offset", D=23, R=10, W=10,
         offset=7, inverse=True, layout="thd"),
    # another order in the result
    Case("neighbours to halves", "DeepSeek-V3: interleaved in, halves out", K=1, D=192, R=64,
         offset=128, interleaved=True, interleaved_out=False, dtype=BF16),
    Case("halves to neighbours", "its backward, but for the sign", D=192, R=64, offset=128,
         interleaved_out=True, dtype=BF16),
    Case("neighbours to halves, inverse", "the way back of halves to neighbours", D=40, R=36,
         interleaved=True, interleaved_out=False, inverse=True, layout="sbhd"),
    Case("neighbours to halves, full width", "columns in the order of the result", D=21, R=18,
         W=18, offset=2, interleaved=True, interleaved_out=False),
    Case("halves to neighbours, full width", "the same, neighbours", D=32, R=32, W=32, ids="BS",
         interleaved_out=True, dtype=F16),
    Case("neighbours to halves, full width, inverse", "columns in the order of x", D=16, R=16,
         W=16, interleaved=True, interleaved_out=False, inverse=True),
    Case("halves to neighbours, full width, inverse", "the same, halves", D=40, R=32, W=32,
         offset=8, interleaved_out=True, inverse=True, dtype=BF16, layout="bhsd"),
    Case("the order said twice", "interleaved_out may be what it is anyway", interleaved=True,
         interleaved_out=True),
    # inverse
    Case("inverse, interleaved", "the backward of interleaved", inverse=True, interleaved=True),
    Case("inverse, ids", "the backward with positions", inverse=True, ids="BS"),
    # float64
    Case("float64", "its own arithmetic", dtype=F64, table_dtype=F64, ids="BS"),
    Case("float64 x, float32 table", "the table widened, not x narrowed", dtype=F64, D=40),
    Case("float32 x, float64 table", "the table rounded first", table_dtype=F64),
]  # fmt: skip

# Pairs of channels: below, at and past the lengths of vectors (4, 8, 16) and of unrolled loops.
PAIRS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 33, 40, 63, 64, 65, 128, 300]
# Tokens and pairs of heads outermost in memory: the CPU takes blocks of up to 16 tokens, and holds
# rows of 1,024 pairs for all of them together.
BLOCKS = [(1, 1030), (2, 520), (5, 300), (15, 80), (16, 65), (17, 72), (33, 128)]


def inputs_of(case, device):
    """q, k (or None) in the case's layout, cos, sin, position_ids, and the options."""
    tokens = (B * case.S,) if case.layout == "thd" else (B, case.S)
    seq = tokens[-1]
    rows = max(L, seq + 3)
    q = random(*tokens, case.H, case.D, dtype=case.dtype, seed=1)
    k = None if case.K is None else random(*tokens, case.K, case.D, dtype=case.dtype, seed=2)
    width = case.W or (case.R or case.D) // 2
    shape = {
        "table": (rows, width),
        "exact table": (seq, width),
        "one for all": (1, seq, width),
        "per token": (*tokens, width),
    }[case.table]
    # At full width, the two halves, and sine and cosine, are independent.
    table = random_table(*shape, dtype=case.table_dtype, device=device)
    ids_shape = {None: None, "S": (seq,), "1S": (1, seq), "BS": (B, seq), "T": (seq,)}[case.ids]
    ids = ids_shape and random_positions(*ids_shape, rows=rows, dtype=case.ids_dtype, device=device)
    options = {"interleaved": case.interleaved, "inverse": case.inverse}
    options |= {"interleaved_out": case.interleaved_out, "rotary_offset": case.offset}
    if case.R is not None:
        options["rotary_dim"] = case.R
    q, k = (x if x is None else in_layout(x, case.layout).to(device) for x in (q, k))
    return q, k, *table, ids, options


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rotation_is_exact_but_for_one_evaluation_and_one_rounding(case, device):
    q, k, cos, sin, ids, options = inputs_of(case, device)
    before = [x.clone() for x in (q, k) if x is not None]
    ys = rotated(case, q, k, cos, sin, ids, options)
    for x, y, unchanged in zip((q, k), ys, before, strict=False):
        assert y.shape == x.shape
        assert y.device == x.device
        assert_same_bits(x, unchanged)
        x, y = in_layout(x, case.layout), in_layout(y, case.layout)
        assert_same_bits(y, rounded_once(x, cos, sin, ids, **options))
        if case.dtype != F64:
            assert_near_exact(y, x, cos, sin, ids, **options)


def rotated(case, q, k, cos, sin, ids, options):
    if k is None:
        return [rope_ext.apply_rotary(q, cos, sin, ids, layout=case.layout, **options)]
    return rope_ext.apply_rotary_qk(q, k, cos, sin, ids, layout=case.layout, **options)


@pytest.mark.parametrize("table_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype_goes_with_every_table_dtype(dtype, table_dtype, device):
    x = random(B, S, 3, 52, dtype=dtype, device=device)
    for (order, pairs), width in product(ORDERS.items(), (20, 40)):  # an angle a pair, a channel
        cos, sin = random_table(L, width, dtype=table_dtype, device=device)
        options = {"rotary_dim": 40, "rotary_offset": 8, **pairs}
        with naming(f"{order}, {width} columns"):
            y = rope.apply_rotary(x, cos, sin, **options)
            assert_same_bits(y, rounded_once(x, cos, sin, **options))
            if dtype != F64:
                assert_near_exact(y, x, cos, sin, **options)


def heads_of_any_size(dtype, device):
    """(x, cos, sin, options): channels before and after, whole vectors and parts of one."""
    for pairs, (before, after) in product(PAIRS, ((0, 0), (0, 1), (8, 6))):
        x = random(B, 3, 2, before + 2 * pairs + after, dtype=dtype, device=device)
        yield x, *random_table(3, pairs, device=device), {"rotary_offset": before}


def blocks_of_tokens(dtype, device):
    """(x, cos, sin, options), with one angle a pair and with one a channel."""
    for (tokens, pairs), columns in product(BLOCKS, (1, 2)):
        x = random(1, 2, tokens, 2 * pairs, dtype=dtype, device=device).transpose(1, 2)
        cos, sin = random_table(tokens, columns * pairs, device=device)
        yield x, cos, sin, {"rotary_dim": 2 * pairs}


@pytest.mark.parametrize("inputs", [heads_of_any_size, blocks_of_tokens])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sizes_that_are_no_multiple_of_a_vector(dtype, order, inputs, device):
    for x, cos, sin, options in inputs(dtype, device):
        options |= ORDERS[order]
        with naming(f"x {list(x.shape)}, table {list(cos.shape)}, {options}"):
            y = rope.apply_rotary(x, cos, sin, **options)
            assert_same_bits(y, rounded_once(x, cos, sin, **options))


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    def assert_same(name, call):
        results = []
        for capability in (vector_code, "portable"):
            _C.set_cpu_capability(capability)
            results.append(call())
        for a, b in zip(*results, strict=True):
            with naming(name):
                assert_same_bits(a, b)

    for case in CASES:
        assert_same(case.name, partial(rotated, case, *inputs_of(case, "cpu")))
    for dtype, inputs in product(DTYPES, (heads_of_any_size, blocks_of_tokens)):
        for x, *table, options in inputs(dtype, "cpu"):
            for order, pairs in ORDERS.items():
                name = f"{dtype}, {order}, {list(x.shape)}, {options}"
                assert_same(name, partial(rope.apply_rotary_qk, x, x, *table, **options, **pairs))


def test_float32_has_the_bits_of_rotate_half(device):
    x = random(B, S, 3, 64, device=device)
    cos, sin = random_table(S, 32, device=device)
    y = rope.apply_rotary(x, cos, sin)
    x, cos, sin = on_cpu([x, cos, sin])
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
    rotate_half = torch.cat((-x[..., 32:], x[..., :32]), -1)
    assert_same_bits(y, x * cos + rotate_half * sin)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_layout_names_the_order_of_the_dimensions(layout, device):
    sizes = {"b": B, "s": S, "t": S, "h": 3, "d": 16}
    x = random(*(sizes[letter] for letter in layout), device=device)
    cos, sin = random_table(S, 8, device=device)
    y = rope_ext.apply_rotary(x, cos, sin, layout=layout)
    assert y.shape == x.shape
    token, head = layout.index("t" if layout == "thd" else "s"), layout.index("h")
    x, y = (t.movedim((token, head), (0, 1)) for t in (x, y))
    for s, h in product(range(S), range(3)):
        expected = rounded_once(x[s, h].reshape(-1, 1, 1, 16), cos[s : s + 1], sin[s : s + 1])
        assert_same_bits(y[s, h].reshape(-1, 1, 1, 16), expected)


def test_inverse_undoes_the_rotation(device):
    x = random(B, S, 3, 21, dtype=F64, device=device)
    cos, sin = random_table(S, 8, dtype=F64, device=device)
    for order, pairs in ORDERS.items():
        options = {"rotary_offset": 3, **pairs}
        y = rope.apply_rotary(x, cos, sin, **options)
        y = rope.apply_rotary(y, cos, sin, **inverse_of(options))
        with naming(order):
            torch.testing.assert_close(y.cpu(), x.cpu(), rtol=0, atol=1e-14)


EMPTY = [  # q's shape, k's heads
    ((0, 5, 4, 16), 2),
    ((2, 0, 4, 16), 2),
    ((2, 5, 0, 16), 2),
    ((2, 5, 4, 16), 0),
    ((2, 5, 0, 16), 0),
    ((0, 4, 16), 2),
    ((5, 0, 16), 0),
]


@pytest.mark.parametrize("with_ids", [False, True], ids=["rows in order", "position_ids"])
def test_empty_tensors_come_back_empty(with_ids, device):
    cos, sin = random_table(7, 8, device=device)
    for shape, k_heads in EMPTY:
        q = random(*shape, device=device)
        k = random(*shape[:-2], k_heads, shape[-1], device=device)
        ids = torch.zeros(shape[-3], dtype=torch.int64, device=device) if with_ids else None
        with naming(f"q {shape}, {k_heads} heads of k"):
            for x, y in zip((q, k), rope.apply_rotary_qk(q, k, cos, sin, ids), strict=True):
                assert_same_bits(y, rounded_once(x, cos, sin, ids))
            rope.apply_rotary_qk_(q.clone(), k.clone(), cos, sin, ids)
            assert rope.apply_rotary(q, cos, sin, ids).shape == q.shape
    no_rows = torch.empty(0, 8, device=device)
    x = random(2, 0, 4, 16, device=device)
    assert rope.apply_rotary(x, no_rows, no_rows).shape == x.shape
