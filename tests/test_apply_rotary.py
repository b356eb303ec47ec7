"""The rotation, to the last bit: every kind of table, positions, dtype and size."""

from dataclasses import dataclass

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
    Case("llama bf16", "as inference runs it", D=128, dtype=BF16),
    Case("llama bf16 decode", "positions of its own for each sequence", D=64, dtype=BF16, ids="BS"),
    Case("mqa", "one head of k", K=1, D=64, dtype=BF16),
    Case("mha", "as many heads of k", K=4, D=64, dtype=F16),
    Case("more k than q", "nothing says that k has fewer heads", H=2, K=6),
    Case("gpt-j", "interleaved, a part of the channels", D=64, R=32, interleaved=True, dtype=F16),
    Case("gpt-neox", "a quarter of the channels rotates", D=64, R=16, K=4),
    Case("phi 2", "32 of 80 channels", D=80, R=32, dtype=BF16),
    Case("roformer", "interleaved, bhsd, q alone", K=None, interleaved=True, layout="bhsd"),
    Case("deepseek", "k is one shared head", H=8, K=1, D=64, interleaved=True, dtype=BF16),
    Case("vision", "rows from two axes, packed patches", D=80, layout="thd", table="exact table"),
    # layouts
    Case("bhsd", "as transformers has it", layout="bhsd", dtype=BF16, D=64),
    Case("sbhd", "as Megatron has it", layout="sbhd", interleaved=True),
    Case("thd", "packed sequences, positions from their lengths", layout="thd", ids="T"),
    Case("thd q alone", "one tensor, packed", layout="thd", K=None, dtype=F16),
    # positions
    Case("ids S", "one row of positions for all sequences", ids="S"),
    Case("ids S int32", "as servers keep them", ids="S", ids_dtype=torch.int32),
    Case("ids 1S", "as transformers passes them", ids="1S", ids_dtype=torch.int32, dtype=BF16),
    Case("ids BS int32", "positions differ by sequence", ids="BS", ids_dtype=torch.int32),
    Case("ids BS q alone", "one tensor", ids="BS", K=None),
    Case("ids T int32", "packed", ids="T", ids_dtype=torch.int32, layout="thd", dtype=BF16),
    Case("ids with sbhd", "the layout does not turn position_ids", ids="BS", layout="sbhd"),
    Case("ids with bhsd", "the layout does not turn position_ids", ids="BS", layout="bhsd"),
    # tables
    Case("exact table", "no row to spare", table="exact table"),
    Case("one row for all", "rows of the step, [1, S, P]", table="one for all", dtype=BF16),
    Case("a row per token", "rows of the step, [B, S, P]", table="per token"),
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
    Case("half width, R given", "rotary_dim said, table of pairs", R=16, W=8, D=20),
    # the last channels, or some in the middle
    Case("last channels", "queries of latent attention", D=24, R=8, offset=16, dtype=BF16),
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
    Case("inverse", "the backward of half-split", inverse=True, D=64, dtype=BF16),
    Case("inverse, interleaved", "the backward of interleaved", inverse=True, interleaved=True),
    Case("inverse, ids", "the backward with positions", inverse=True, ids="BS"),
    # float64
    Case("float64", "its own arithmetic", dtype=F64, table_dtype=F64, ids="BS"),
    Case("float64 x, float32 table", "the table widened, not x narrowed", dtype=F64, D=40),
    Case("float32 x, float64 table", "the table rounded first", table_dtype=F64),
    Case("float64 interleaved inverse", "all of it", dtype=F64, table_dtype=F64, D=26, R=22,
         interleaved=True, inverse=True),
]  # fmt: skip

# Pairs of channels: below, at and past the lengths of vectors (4, 8, 16) and of unrolled loops.
PAIRS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 33, 40, 63, 64, 65, 128, 300]


def inputs_of(case, device):
    """q, k (or None) in the case's layout, cos, sin, position_ids, and the options."""
    tokens = (B * S,) if case.layout == "thd" else (B, S)
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
def test_rotation_is_exact_but_for_one_evaluation_and_one_rounding(case, backend):
    q, k, cos, sin, ids, options = inputs_of(case, backend)
    xs = [q] if k is None else [q, k]
    before = [x.clone() for x in xs]
    if k is None:
        ys = [rope_ext.apply_rotary(q, cos, sin, ids, layout=case.layout, **options)]
    else:
        ys = rope_ext.apply_rotary_qk(q, k, cos, sin, ids, layout=case.layout, **options)
    for x, y, unchanged in zip(xs, ys, before, strict=True):
        assert y.shape == x.shape
        assert y.device == x.device
        assert_same_bits(x, unchanged)
        x, y = in_layout(x, case.layout), in_layout(y, case.layout)
        assert_same_bits(y, rounded_once(x, cos, sin, ids, **options))
        if case.dtype != F64:
            assert_near_exact(y, x, cos, sin, ids, **options)


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype_goes_with_every_table_dtype(dtype, table_dtype, order, backend):
    x = random(B, S, 3, 52, dtype=dtype, device=backend)
    for width in (20, 40):  # one angle a pair, one a channel
        cos, sin = random_table(L, width, dtype=table_dtype, device=backend)
        options = {"rotary_dim": 40, "rotary_offset": 8, **ORDERS[order]}
        y = rope.apply_rotary(x, cos, sin, **options)
        assert_same_bits(y, rounded_once(x, cos, sin, **options))
        if dtype != F64:
            assert_near_exact(y, x, cos, sin, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_any_number_of_pairs(pairs, order, backend):
    for dtype in (F32, BF16, F16, F64):
        cos, sin = random_table(3, pairs, device=backend)
        for before, after in ((0, 0), (0, 1), (8, 6)):  # channels that do not rotate
            x = random(B, 3, 2, before + 2 * pairs + after, dtype=dtype, device=backend)
            options = {"rotary_offset": before, **ORDERS[order]}
            y = rope.apply_rotary(x, cos, sin, **options)
            assert_same_bits(y, rounded_once(x, cos, sin, **options))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("full_width", [False, True], ids=["angle a pair", "angle a channel"])
def test_long_heads_of_short_sequences(full_width, order, backend):
    """[B, H, S, D] in memory is processed in blocks of tokens, whose table rows share a scratch
    buffer: here with numbers of tokens and of pairs that are not multiples of it.
    """
    for dtype in (F32, BF16, F16, F64):
        for tokens in (*range(1, 18), 33):
            for dim in (130, 144, 160, 192, 256, 600):
                x = random(1, 2, tokens, dim, dtype=dtype, device=backend).transpose(1, 2)
                cos, sin = random_table(tokens, dim if full_width else dim // 2, device=backend)
                options = {"rotary_dim": dim, **ORDERS[order]}
                y = rope.apply_rotary(x, cos, sin, **options)
                assert_same_bits(y, rounded_once(x, cos, sin, **options))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_portable_and_avx2_give_the_same_bits(dtype, order, avx2):
    q, k = random(2, 9, 3, 52, dtype=dtype), random(2, 9, 1, 52, dtype=dtype)
    cos, sin = random_table(9, 21)
    options = {"rotary_offset": 7, **ORDERS[order]}
    fast = rope.apply_rotary_qk(q, k, cos, sin, **options)
    _C.set_cpu_capability("portable")
    slow = rope.apply_rotary_qk(q, k, cos, sin, **options)
    assert_same_bits(fast[0], slow[0])
    assert_same_bits(fast[1], slow[1])


def test_float32_has_the_bits_of_rotate_half(backend):
    x = random(B, S, 3, 64, device=backend)
    cos, sin = random_table(S, 32, device=backend)
    y = rope.apply_rotary(x, cos, sin)
    x, cos, sin = on_cpu([x, cos, sin])
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
    rotate_half = torch.cat((-x[..., 32:], x[..., :32]), -1)
    assert_same_bits(y, x * cos + rotate_half * sin)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_layout_names_the_order_of_the_dimensions(layout, device):
    if layout == "thd":
        x = random(S, 3, 16, device=device)
    else:
        sizes = {"b": B, "s": S, "h": 3, "d": 16}
        x = random(*(sizes[letter] for letter in layout), device=device)
    cos, sin = random_table(S, 8, device=device)
    y = rope_ext.apply_rotary(x, cos, sin, layout=layout)
    assert y.shape == x.shape
    token, head = layout.index("t" if layout == "thd" else "s"), layout.index("h")
    for s in range(S):
        for h in range(3):
            one = x.select(token, s).select(head - (token < head), h).cpu()
            expected = rounded_once(one.reshape(-1, 1, 1, 16), cos[s : s + 1], sin[s : s + 1])
            got = y.select(token, s).select(head - (token < head), h)
            assert_same_bits(got.reshape(-1, 1, 1, 16), expected)


def test_q_and_k_together_are_q_and_k_alone(backend):
    q, k = random(B, S, 4, 32, device=backend), random(B, S, 1, 32, device=backend, seed=3)
    cos, sin = random_table(L, 16, device=backend)
    ids = random_positions(B, S, rows=L, device=backend)
    together = rope.apply_rotary_qk(q, k, cos, sin, ids)
    assert_same_bits(together[0], rope.apply_rotary(q, cos, sin, ids))
    assert_same_bits(together[1], rope.apply_rotary(k, cos, sin, ids))


def test_scores_depend_on_the_distance_of_positions_only(device):
    inv_freq = rope_ext.frequencies.default(64, device=device)[0].double()
    cos, sin = rope_ext.cos_sin_cache(inv_freq, 4000)
    q, k = random(1, 1, 1, 64, dtype=F64), random(1, 1, 1, 64, dtype=F64, seed=1)

    def score(m, n):
        ids = [torch.tensor([p], device=device) for p in (m, n)]
        rotated = [
            rope.apply_rotary(x.to(device), cos, sin, i).cpu()
            for x, i in zip((q, k), ids, strict=True)
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(3907, 3900), score(7, 0), rtol=1e-12, atol=1e-12)
    assert (score(8, 0) - score(7, 0)).abs() > 1e-3


@pytest.mark.parametrize("order", ORDERS)
def test_inverse_undoes_the_rotation(order, device):
    x = random(B, S, 3, 21, dtype=F64, device=device)
    cos, sin = random_table(S, 8, dtype=F64, device=device)
    options = {"rotary_offset": 3, **ORDERS[order]}
    y = rope.apply_rotary(x, cos, sin, **options)
    y = rope.apply_rotary(y, cos, sin, **inverse_of(options))
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


@pytest.mark.parametrize(("shape", "k_heads"), EMPTY, ids=str)
def test_empty_tensors_come_back_empty(shape, k_heads, device):
    q = random(*shape, device=device)
    k = random(*shape[:-2], k_heads, shape[-1], device=device)
    cos, sin = random_table(7, 8, device=device)
    for ids in (None, torch.zeros(shape[-3], dtype=torch.int64, device=device)):
        out_q, out_k = rope.apply_rotary_qk(q, k, cos, sin, ids)
        assert out_q.shape == q.shape
        assert out_k.shape == k.shape
        if ids is None:
            assert_same_bits(out_k, rounded_once(k, cos, sin))
        rope.apply_rotary_qk_(q.clone(), k.clone(), cos, sin, ids)
        assert rope.apply_rotary(q, cos, sin, ids).shape == q.shape


def test_empty_sequence_needs_no_row_of_the_table(device):
    cos = torch.empty(0, 8, device=device)
    assert rope.apply_rotary(random(2, 0, 4, 16, device=device), cos, cos).shape == (2, 0, 4, 16)
