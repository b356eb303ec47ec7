"""Every error names operator, argument, expected and got, and nothing has been written."""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from support import (
    VIEWS,
    assert_same_bits,
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

B, S, H, K, D, P, L = 2, 5, 4, 2, 16, 8, 9

# Every way to rotate: the operators and the functions, out of place and in place.
ROTATIONS = {
    "rope::apply_rotary": rope.apply_rotary,
    "rope::apply_rotary_": rope.apply_rotary_,
    "rope::apply_rotary_qk": rope.apply_rotary_qk,
    "rope::apply_rotary_qk_": rope.apply_rotary_qk_,
    "apply_rotary": rope_ext.apply_rotary,
    "apply_rotary in place": lambda *a, **k: rope_ext.apply_rotary(*a, **k, inplace=True),
    "apply_rotary_qk": rope_ext.apply_rotary_qk,
    "apply_rotary_qk in place": lambda *a, **k: rope_ext.apply_rotary_qk(*a, **k, inplace=True),
}
OPERATOR = {  # the operators that the functions call
    "apply_rotary": "rope::apply_rotary",
    "apply_rotary in place": "rope::apply_rotary_",
    "apply_rotary_qk": "rope::apply_rotary_qk",
    "apply_rotary_qk in place": "rope::apply_rotary_qk_",
}
IN_PLACE = [name for name in ROTATIONS if name.endswith(("_", "in place"))]
OF_PAIRS = [name for name in ROTATIONS if "qk" in name]


def good_arguments(device, *, ids=True):
    cos, sin = random_table(L, P, device=device)
    return {
        "q": random(B, S, H, D, device=device),
        "k": random(B, S, K, D, device=device),
        "cos": cos,
        "sin": sin,
        "position_ids": random_positions(B, S, rows=L, device=device) if ids else None,
    }


def rotate(rotation, arguments):
    arguments = dict(arguments)
    positional = [arguments.pop(name) for name in ("q", "k", "cos", "sin", "position_ids")]
    if rotation not in OF_PAIRS:
        del positional[1]
    return ROTATIONS[rotation](*positional, **arguments)


def expect_refusal(rotation, arguments, expected, got, error=RuntimeError, operator=None):
    """Runs the rotation. It has to raise the message and to leave all tensors unchanged."""
    operator = operator or OPERATOR.get(rotation, rotation)
    first = "q" if rotation in OF_PAIRS else "x"
    message = f"{operator}: expected {expected.format(x=first)}"
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    kept = [whole(t).clone() for t in tensors if not t.is_meta]
    versions = [t._version for t in tensors]
    with pytest.raises(error, match=f"^{re.escape(message)}.*, got {re.escape(got)}"):
        rotate(rotation, arguments)
    for t, bits in zip([t for t in tensors if not t.is_meta], kept, strict=True):
        assert torch.equal(whole(t), bits)
    assert [t._version for t in tensors] == versions


def whole(t):
    """All bytes of t's allocation."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).cpu()


@dataclass(frozen=True)
class Case:
    name: str
    change: Callable[[dict], dict]  # good arguments -> replaced arguments
    expected: str  # {x} is x or q
    got: str
    ids: bool = True  # whether position_ids are among the good arguments


# Wrong arguments of every operator.
CASES = [
    # x
    Case("int x", lambda a: {"q": a["q"].int(), "k": a["k"].int()},
         "{x} to be float64, float32, float16 or bfloat16", "int32"),
    Case("int64 x", lambda a: {"q": a["q"].long(), "k": a["k"].long()},
         "{x} to be float64, float32, float16 or bfloat16", "int64"),
    Case("fp8 x", lambda a: {"q": a["q"].to(torch.float8_e4m3fn), "k": a["k"]},
         "{x} to be float64, float32, float16 or bfloat16", "float8_e4m3fn"),
    Case("complex x", lambda a: {"q": a["q"].to(torch.complex64)},
         "{x} to be float64, float32, float16 or bfloat16", "complex64"),
    Case("x with stride 2", lambda a: {"q": twice_as_wide(a["q"])},
         "{x} to have stride 1 in its last dimension", f"strides [{2 * S * H * D}, "
         f"{2 * H * D}, {2 * D}, 2]"),
    Case("x with stride 0", lambda a: {"q": a["q"][..., :1].expand(B, S, H, D)},
         "{x} to have stride 1 in its last dimension", f"strides [{S * H * D}, {H * D}, {D}, 0]"),
    Case("x with channels first", lambda a: {"q": a["q"].permute(0, 3, 1, 2).contiguous()
                                             .permute(0, 2, 3, 1)},
         "{x} to have stride 1 in its last dimension", "strides ["),
    # rotary_dim
    Case("odd rotary_dim", lambda a: {"rotary_dim": 15},
         "rotary_dim to be even, at least 2 and at most head_dim 16", "15"),
    Case("rotary_dim above D", lambda a: {"rotary_dim": 18},
         "rotary_dim to be even, at least 2 and at most head_dim 16", "18"),
    Case("rotary_dim 0", lambda a: {"rotary_dim": 0},
         "rotary_dim to be even, at least 2 and at most head_dim 16", "0"),
    Case("rotary_dim below 0", lambda a: {"rotary_dim": -2},
         "rotary_dim to be even, at least 2 and at most head_dim 16", "-2"),
    Case("table too wide", lambda a: dict(zip(("cos", "sin"), like(a, L, 9), strict=True)),
         "rotary_dim, twice the width of cos, to be even, at least 2 and at most head_dim 16",
         "18"),
    Case("table without columns", lambda a: dict(zip(("cos", "sin"), like(a, L, 0), strict=True)),
         "rotary_dim, twice the width of cos, to be even, at least 2 and at most head_dim 16", "0"),
    # rotary_offset
    Case("rotary_offset below 0", lambda a: {"rotary_offset": -1},
         "rotary_offset to be at least 0 and at most head_dim - rotary_dim, 16 - 16", "-1"),
    Case("rotary_offset where all rotates", lambda a: {"rotary_offset": 1},
         "rotary_offset to be at least 0 and at most head_dim - rotary_dim, 16 - 16", "1"),
    Case("rotary_offset too far", lambda a: {"rotary_offset": 5, "rotary_dim": 12,
                                             **tables(a, L, 6)},
         "rotary_offset to be at least 0 and at most head_dim - rotary_dim, 16 - 12", "5"),
    Case("rotary_offset past all", lambda a: {"rotary_offset": 2**63 - 1},
         "rotary_offset to be at least 0 and at most head_dim - rotary_dim, 16 - 16",
         str(2**63 - 1)),
    # cos and sin
    Case("table too narrow", lambda a: {"rotary_dim": 16, **tables(a, L, 7)},
         "cos to have shape [L, 8|16]", f"[{L}, 7]"),
    Case("table wider than half, not full", lambda a: {"rotary_dim": 16, **tables(a, L, 12)},
         "cos to have shape [L, 8|16]", f"[{L}, 12]"),
    Case("sin of another shape", lambda a: {"sin": a["sin"][:-1]},
         f"sin of cos's shape [{L}, {P}]", f"[{L - 1}, {P}]"),
    Case("sin of another width", lambda a: {"sin": like(a, L, 7)[0]},
         f"sin of cos's shape [{L}, {P}]", f"[{L}, 7]"),
    Case("sin of another dtype", lambda a: {"sin": a["sin"].double()},
         "sin of cos's dtype float32", "float64"),
    Case("int table", lambda a: {"cos": a["cos"].int(), "sin": a["sin"].int()},
         "cos to be float64, float32, float16 or bfloat16", "int32"),
    Case("cos with stride 2", lambda a: {"cos": twice_as_wide(a["cos"])},
         "cos to have stride 1 in its last dimension", f"strides [{2 * P}, 2]"),
    Case("sin with stride 2", lambda a: {"sin": twice_as_wide(a["sin"])},
         "sin to have stride 1 in its last dimension", f"strides [{2 * P}, 2]"),
    Case("table of rank 1", lambda a: {"cos": a["cos"][0], "sin": a["sin"][0]},
         "cos to have shape [L, W] or [1|B, S, W]", f"[{P}]"),
    Case("table of rank 4", lambda a: {"cos": a["cos"][None, None], "sin": a["sin"][None, None]},
         "cos to have shape [L, W] or [1|B, S, W]", f"[1, 1, {L}, {P}]"),
    Case("rows and positions", lambda a: tables(a, B, S, P),
         f"cos to have shape [L, {P}]", f"[{B}, {S}, {P}]"),
    Case("rows for another S", lambda a: tables(a, B, S - 2, P),
         f"cos to have shape [L, {P}] or [1|B, S, {P}]", f"[{B}, {S - 2}, {P}]", ids=False),
    Case("rows for another B", lambda a: tables(a, B + 1, S, P),
         f"cos to have shape [L, {P}] or [1|B, S, {P}]", f"[{B + 1}, {S}, {P}]", ids=False),
    Case("S > L without position_ids", lambda a: tables(a, S - 2, P),
         f"cos to have a row for each of the {S} positions (no position_ids were given)",
         f"[{S - 2}, {P}]", ids=False),
    # position_ids
    Case("float positions", lambda a: {"position_ids": a["position_ids"].float()},
         "position_ids to be int32 or int64", "float32"),
    Case("bool positions", lambda a: {"position_ids": a["position_ids"].bool()},
         "position_ids to be int32 or int64", "bool"),
    Case("int16 positions", lambda a: {"position_ids": a["position_ids"].short()},
         "position_ids to be int32 or int64", "int16"),
    Case("positions for another S", lambda a: {"position_ids": a["position_ids"][:, :-2]},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", f"[{B}, {S - 2}]"),
    Case("positions for another B", lambda a: {"position_ids": zeros(a, B + 1, S)},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", f"[{B + 1}, {S}]"),
    Case("positions [S, B]", lambda a: {"position_ids": zeros(a, S, B)},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", f"[{S}, {B}]"),
    Case("positions [B]", lambda a: {"position_ids": zeros(a, B)},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", f"[{B}]"),
    Case("positions [1]", lambda a: {"position_ids": zeros(a, 1)},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", "[1]"),
    Case("a scalar position", lambda a: {"position_ids": zeros(a)},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", "[]"),
    Case("positions of rank 3", lambda a: {"position_ids": zeros(a, 1, B, S)},
         f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}", f"[1, {B}, {S}]"),
]  # fmt: skip

# Wrong k.
PAIR_CASES = [
    Case("k of another B", lambda a: {"k": random(B + 1, S, K, D).to(a["q"])},
         f"k to have q's shape [{B}, {S}, {H}, {D}] in all but the number of heads",
         f"[{B + 1}, {S}, {K}, {D}]"),
    Case("k of another S", lambda a: {"k": random(B, S + 1, K, D).to(a["q"])},
         f"k to have q's shape [{B}, {S}, {H}, {D}] in all but the number of heads",
         f"[{B}, {S + 1}, {K}, {D}]"),
    Case("k of another D", lambda a: {"k": random(B, S, K, D + 2).to(a["q"])},
         f"k to have q's shape [{B}, {S}, {H}, {D}] in all but the number of heads",
         f"[{B}, {S}, {K}, {D + 2}]"),
    Case("k of another dtype", lambda a: {"k": a["k"].bfloat16()},
         "k of q's dtype float32", "bfloat16"),
    Case("int k", lambda a: {"k": a["k"].int()},
         "k to be float64, float32, float16 or bfloat16", "int32"),
    Case("k with stride 2", lambda a: {"k": twice_as_wide(a["k"])},
         "k to have stride 1 in its last dimension", "strides ["),
]  # fmt: skip


def like(arguments, *shape):
    return random_table(*shape, device=arguments["q"].device)


def tables(arguments, *shape):
    return dict(zip(("cos", "sin"), like(arguments, *shape), strict=True))


def zeros(arguments, *shape):
    return torch.zeros(shape, dtype=torch.int64).to(arguments["q"].device)


def twice_as_wide(t):
    """t's shape, with stride 2 in the last dimension."""
    return torch.cat((t, t), -1)[..., ::2]


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_argument_is_refused_and_nothing_written(case, rotation, device):
    arguments = good_arguments(device, ids=case.ids)
    arguments.update(case.change(arguments))
    expect_refusal(rotation, arguments, case.expected, case.got)


@pytest.mark.parametrize("rotation", IN_PLACE)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_another_order_of_the_pairs_is_refused_in_place(interleaved, rotation, device):
    """An in-place rotation writes its pairs to where it read them."""
    arguments = {**good_arguments(device), "interleaved": interleaved}
    arguments["interleaved_out"] = not interleaved
    name = rotation.removesuffix(" in place")
    operator = rotation if name == rotation else f"rope_ext.{name}"
    expected = f"interleaved_out to be None or interleaved, {interleaved}"
    expect_refusal(rotation, arguments, expected, str(not interleaved), operator=operator)


@pytest.mark.parametrize("function", [rope_ext.apply_rotary, rope_ext.apply_rotary_qk])
def test_another_order_of_the_pairs_is_refused_in_place_under_compile(function):
    """A graph with gradients rotates out of place, so this would be possible there."""
    q = random(B, S, H, D).requires_grad_()
    cos, sin = random_table(S, P)
    count = 2 if function is rope_ext.apply_rotary_qk else 1

    @torch.compile(backend="eager", fullgraph=True)
    def rotate(q):
        xs = [q * (i + 1) for i in range(count)]
        return function(*xs, cos, sin, interleaved_out=True, inplace=True)

    with pytest.raises(Exception, match="expected interleaved_out to be None or interleaved"):
        rotate(q)


@pytest.mark.parametrize("rotary_offset", [-1, 5])
def test_bad_rotary_offset_of_the_gradient_to_the_table_is_refused(rotary_offset, device):
    x, (cos, _) = random(B, S, H, D, device=device), random_table(S, 6, device=device)
    message = (
        "rope::apply_rotary_table_backward: expected rotary_offset to be at least 0 and at most "
        f"head_dim - rotary_dim, 16 - 12, got {rotary_offset}"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        rope.apply_rotary_table_backward(x, x, None, None, cos, rotary_offset=rotary_offset)


@pytest.mark.parametrize("rotation", OF_PAIRS)
@pytest.mark.parametrize("case", PAIR_CASES, ids=lambda case: case.name)
def test_k_that_does_not_go_with_q_is_refused_and_nothing_written(case, rotation, device):
    arguments = good_arguments(device)
    arguments.update(case.change(arguments))
    expect_refusal(rotation, arguments, case.expected, case.got)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_good_arguments_are_accepted(rotation, device):
    """Otherwise the errors above would prove nothing."""
    for ids in (True, False):
        arguments = good_arguments(device, ids=ids)
        q = arguments["q"].clone()
        result = rotate(rotation, arguments)
        if result is None:
            got = arguments["q"]
        else:
            got = result[0] if rotation in OF_PAIRS else result
        tables_and_ids = (arguments[name] for name in ("cos", "sin", "position_ids"))
        assert_same_bits(got, rounded_once(q, *tables_and_ids))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("shape", [(D,), (S, D), (1, B, S, H, D)], ids=str)
def test_wrong_rank_is_refused_and_nothing_written(shape, rotation, device):
    arguments = good_arguments(device)
    arguments["q"] = random(*shape, device=device)
    if rotation in OPERATOR:  # the functions check the layout first
        kept = arguments["q"].clone()
        name = "q" if rotation in OF_PAIRS else "x"
        function = rotation.split()[0]
        message = (
            f"rope_ext.{function}: expected {name} to have shape [B, S, H, D] (layout 'bshd'), "
            f"got {list(shape)}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            rotate(rotation, arguments)
        assert_same_bits(arguments["q"], kept)
    else:
        expected = "{x} to have shape [B, S, H, D] or [T, H, D]"
        expect_refusal(rotation, arguments, expected, str(list(shape)))


@pytest.mark.parametrize("rotation", OF_PAIRS)
def test_packed_k_beside_unpacked_q_is_refused(rotation, device):
    arguments = good_arguments(device)
    arguments["k"] = random(S, K, D, device=device)
    if rotation in OPERATOR:
        with pytest.raises(ValueError, match=r"expected k to have shape \[B, S, H, D\]"):
            rotate(rotation, arguments)
    else:
        expected = f"k to have q's shape [{B}, {S}, {H}, {D}]"
        expect_refusal(rotation, arguments, expected, f"[{S}, {K}, {D}]")


@pytest.mark.parametrize("layout", ["thd", "hbsd", "BSHD", ""])
def test_layout_that_does_not_fit_is_refused(layout, device):
    arguments = good_arguments(device)
    kept = arguments["q"].clone()
    match = (
        r"\[T, H, D\] \(layout 'thd'\), got" if layout == "thd" else "bshd, bhsd, sbhd, thd, got"
    )
    for rotation in OPERATOR:
        with pytest.raises(ValueError, match=match):
            rotate(rotation, {**arguments, "layout": layout})
    assert_same_bits(arguments["q"], kept)


# ---- packed


PACKED = [
    ("positions of rank 2", {"position_ids": (1, S)},
     f"position_ids to have shape [T] with T = {S}", f"[1, {S}]"),
    ("too few positions", {"position_ids": (S - 1,)},
     f"position_ids to have shape [T] with T = {S}", f"[{S - 1}]"),
    ("rows of two sequences", {"table": (2, S, P), "position_ids": None},
     f"cos to have shape [L, {P}] or [1, T, {P}] with T = {S}", f"[2, {S}, {P}]"),
    ("rows and positions", {"table": (1, S, P), "position_ids": (S,)},
     f"cos to have shape [L, {P}]", f"[1, {S}, {P}]"),
    ("T > L", {"table": (S - 1, P), "position_ids": None},
     f"cos to have a row for each of the {S} positions", f"[{S - 1}, {P}]"),
]  # fmt: skip


@pytest.mark.parametrize("rotation", [name for name in ROTATIONS if name.startswith("rope::")])
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case[0])
def test_bad_argument_beside_packed_tokens_is_refused_and_nothing_written(case, rotation, device):
    _, change, expected, got = case
    arguments = good_arguments(device)
    arguments["q"] = random(S, H, D, device=device)
    arguments["k"] = random(S, K, D, device=device)
    arguments.update(tables(arguments, *change.get("table", (L, P))))
    ids = change["position_ids"]
    arguments["position_ids"] = None if ids is None else zeros(arguments, *ids)
    expect_refusal(rotation, arguments, expected, got)


# ---- positions outside of the table


OUTSIDE = [  # value, at, dtype
    (-1, (0, 0), torch.int64),
    (L, (1, 3), torch.int64),
    (-1, (1, S - 1), torch.int32),
    (L, (0, 2), torch.int32),
    (2**31 - 1, (0, 1), torch.int32),
    (-(2**31), (1, 0), torch.int32),
    (2**62, (1, 4), torch.int64),
    (-(2**63), (0, 4), torch.int64),
    (2**32, (0, 0), torch.int64),  # 0 if cut to 32 bits
]


def with_position(arguments, value, at, dtype):
    ids = random_positions(B, S, rows=L, dtype=dtype)
    ids[at] = value
    return {**arguments, "position_ids": ids.to(arguments["q"].device)}


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("value", "at", "dtype"), OUTSIDE)
def test_position_outside_the_table_raises_and_writes_nothing(value, at, dtype, rotation):
    arguments = with_position(good_arguments("cpu"), value, at, dtype)
    expect_refusal(
        rotation,
        arguments,
        f"position_ids in [0, {L}), the rows of cos and sin",
        f"{value} at index [{at[0]}, {at[1]}]",
    )


@pytest.mark.parametrize("shape", ["[S]", "[1, S]", "[T]"])
def test_position_outside_is_named_by_its_index_in_every_shape(shape):
    arguments = good_arguments("cpu")
    ids = torch.tensor([0, 1, 2, L, -1])
    index = {"[S]": "[3]", "[1, S]": "[0, 3]", "[T]": "[3]"}[shape]
    if shape == "[T]":
        arguments["q"], arguments["k"] = random(S, H, D), random(S, K, D)
    arguments["position_ids"] = ids[None] if shape == "[1, S]" else ids
    for rotation in ("rope::apply_rotary", "rope::apply_rotary_qk_"):
        expect_refusal(rotation, arguments, f"position_ids in [0, {L})", f"{L} at index {index}")


def test_positions_of_no_token_are_looked_at_in_no_time():
    arguments = {**good_arguments("cpu"), **{x: torch.empty(2**33, 0, H, D) for x in "qk"}}
    arguments["position_ids"] = torch.empty(2**33, 0, dtype=torch.int64)
    start = time.monotonic()
    rotate("rope::apply_rotary_qk", arguments)
    assert time.monotonic() - start < 1  # a loop over 2^33 sequences takes seconds


def test_positions_at_both_ends_of_the_table_are_accepted(device):
    x = random(1, 2, H, D, device=device)
    cos, sin = random_table(L, P, device=device)
    ids = torch.tensor([0, L - 1], device=device)
    assert_same_bits(rope.apply_rotary(x, cos, sin, ids), rounded_once(x, cos, sin, ids))


@pytest.mark.cuda
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("value", "at", "dtype"), OUTSIDE)
def test_position_outside_the_table_gives_a_nan_row_on_cuda(value, at, dtype, rotation):
    arguments = with_position(good_arguments("cuda"), value, at, dtype)
    arguments["cos"], arguments["sin"] = random_table(L, P - 2, device="cuda")
    q, k, cos, sin, ids = on_cpu(arguments.values())
    ids[at] = 0
    expected = [rounded_once(x, cos, sin, ids) for x in (q, k)]
    for e in expected:
        e[at][:, : 2 * (P - 2)] = float("nan")  # channels past rotary_dim stay
    result = rotate(rotation, arguments)
    if result is None:
        result = arguments["q"], arguments["k"]
    if rotation not in OF_PAIRS:
        result = result[0] if isinstance(result, tuple) else result
        assert_same_bits(result, expected[0])
    else:
        assert_same_bits(result[0], expected[0])
        assert_same_bits(result[1], expected[1])


@pytest.mark.cuda
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("value", "at", "dtype"), OUTSIDE[:4])
def test_position_outside_raises_on_cuda_where_asked(value, at, dtype, rotation, monkeypatch):
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    arguments = with_position(good_arguments("cuda"), value, at, dtype)
    expect_refusal(
        rotation,
        arguments,
        f"position_ids in [0, {L}), the rows of cos and sin",
        f"{value} at index [{at[0]}, {at[1]}]",
    )


# One invalid entry of the arguments that the gradient to a table is summed by: tensor, index,
# value.
BAD_ENTRIES = [
    *(("token_order", 2, value) for value in (-1, 6, 2**63 - 1, -(2**63))),
    *(("row_offsets", 1, value) for value in (-1, 7, 2**63 - 1, -(2**63))),
    ("row_offsets", 1, 5),  # inside, but past the next
]


@pytest.mark.parametrize(("name", "at", "value"), BAD_ENTRIES)
def test_bad_tokens_and_rows_are_refused_and_on_cuda_add_nothing(name, at, value, device):
    """On CUDA nothing is read outside of a tensor either: the emulator would report it."""
    tokens, rows = 6, 3
    grad, x = (random(tokens, H, D, dtype=torch.float64, seed=seed) for seed in (1, 2))
    cos = torch.zeros(rows, P, dtype=torch.float64)
    order, offsets = torch.arange(tokens), torch.tensor([0, 2, 4, 6])
    {"token_order": order, "row_offsets": offsets}[name][at] = value
    arguments = [
        t if t is None else t.to(device) for t in (grad, x, None, None, cos, order, offsets)
    ]
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=rf"table_backward: expected {name} .*, got -?\d+$"):
            rope.apply_rotary_table_backward(*arguments)
        return
    used = [range(a, b) if 0 <= a <= b <= tokens else () for a, b in pairwise(offsets.tolist())]
    each = rope.apply_rotary_table_backward(
        grad[None], x[None], None, None, cos.new_zeros(1, tokens, P)
    )
    got = rope.apply_rotary_table_backward(*arguments)
    for grad_of_table, of_token in zip(got, each, strict=True):
        for row, places in enumerate(used):
            inside = [order[i].item() for i in places if 0 <= order[i] < tokens]
            torch.testing.assert_close(grad_of_table[row].cpu(), of_token[0, inside].sum(0))


# ---- devices


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("argument", ["k", "cos", "sin", "position_ids"])
def test_tensor_on_another_device_is_refused_and_nothing_written(argument, rotation, device):
    """The meta device replaces the other device on a machine without a GPU."""
    if argument == "k" and rotation not in OF_PAIRS:
        return
    arguments = good_arguments(device)
    other = "meta" if device.type == "cpu" else "cpu"
    arguments[argument] = arguments[argument].to(other)
    here = "cpu" if device.type == "cpu" else "cuda:0"
    expect_refusal(rotation, arguments, f"{argument} on the device of {{x}}, {here}", "")


BACKWARD = {
    "apply_rotary_table_backward": lambda x, t: {
        "grad_q": x, "q": x, "grad_k": x, "k": x, "cos": t,
    },
    "cos_sin_backward": lambda x, t: {"grad_cos": t, "grad_sin": t, "inv_freq": t[0]},
    "rms_norm_rotary_qk_backward": lambda x, t: {
        "grad_q": x, "grad_k": x, "q": x, "k": x, "q_weight": x[0, 0, 0], "k_weight": x[0, 0, 0],
        "cos": t, "sin": t,
    },
}  # fmt: skip


@pytest.mark.parametrize("operator", BACKWARD)
def test_backward_of_tensors_on_two_devices_is_refused(operator):
    """Raised by the fake too, which PyTorch calls if one tensor has no data."""
    arguments = BACKWARD[operator](random(B, S, H, D), random(S, P))
    for name, x in arguments.items():
        with pytest.raises(RuntimeError, match=rf"rope::{operator}: expected \w+ on the device of"):
            getattr(rope, operator)(**{**arguments, name: x.to("meta")})


@pytest.mark.parametrize("rotation", ["rope::apply_rotary", "rope::apply_rotary_qk_"])
def test_table_on_another_device_is_refused_by_the_kernel(rotation):
    """The kernel's own check, after the dispatcher's choice of a kernel."""
    arguments = good_arguments("cpu", ids=False)
    kept = arguments["q"].clone()
    cos, sin = arguments["cos"].to("meta"), arguments["sin"].to("meta")
    xs = [arguments["q"], arguments["k"]][: 2 if rotation in OF_PAIRS else 1]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{rotation}: expected cos on the device of [xq], cpu"):
        ROTATIONS[rotation].default.redispatch(keys, *xs, cos, sin)
    assert_same_bits(arguments["q"], kept)


WITHOUT_CUDA = {
    "apply_rotary": lambda x, table: (x, table, table),
    "apply_rotary_": lambda x, table: (x, table, table),
    "apply_rotary_qk": lambda x, table: (x, x, table, table),
    "apply_rotary_qk_": lambda x, table: (x, x.clone(), table, table),
    "apply_rotary_table_backward": lambda x, table: (x, x, None, None, table),
    "cos_sin_cache": lambda x, table: (table[0], 3),
    "cos_sin": lambda x, table: (table[0], torch.arange(3, device="meta")),
    "cos_sin_backward": lambda x, table: (table, table, table[0]),
    "apply_rotary_qk_at": lambda x, table: (x, x, table[0]),
    "apply_rotary_qk_at_": lambda x, table: (x, x.clone(), table[0]),
}


@pytest.mark.skipif(_C.build_info()["cuda"], reason="built with CUDA")
@pytest.mark.parametrize("operator", WITHOUT_CUDA)
def test_cuda_tensor_with_a_build_without_cuda_says_so(operator):
    """The CUDA kernel is called directly: meta tensors replace CUDA tensors."""
    x, table = torch.empty(B, S, H, D, device="meta"), torch.empty(S, P, device="meta")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    arguments = WITHOUT_CUDA[operator](x, table)
    with pytest.raises(RuntimeError, match=f"rope::{operator}: built without CUDA: ."):
        getattr(rope, operator).default.redispatch(keys, *arguments)


# ---- memory that is written twice, or read after a write


@pytest.mark.parametrize("rotation", IN_PLACE)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "sequence", "heads"])
def test_expanded_tensor_is_refused_in_place(dim, rotation, device):
    shape = [B, S, H, D]
    shape[dim] = 1
    arguments = good_arguments(device)
    arguments["q"] = random(*shape, device=device).expand(B, S, H, D)
    strides = list(arguments["q"].stride())
    expected = "{x} to have no two elements in one place, as it is written"
    expect_refusal(rotation, arguments, expected, f"strides {strides}")


@pytest.mark.parametrize("rotation", [name for name in IN_PLACE if name in OF_PAIRS])
def test_expanded_k_is_refused_in_place(rotation, device):
    arguments = good_arguments(device)
    arguments["k"] = random(B, S, 1, D, device=device).expand(B, S, K, D)
    expect_refusal(rotation, arguments, "k to have no two elements in one place", "strides")


@pytest.mark.parametrize("rotation", IN_PLACE)
def test_windows_that_overlap_are_refused_in_place(rotation, device):
    """As from unfold: no stride is 0."""
    arguments = good_arguments(device)
    line = random(200, device=device)
    arguments["q"] = line.as_strided((B, S, H, D), (80, 16, 8, 1))
    expect_refusal(rotation, arguments, "{x} to have no two elements in one place", "strides")


def same_tensor(base):
    x = base(B, S, H, D)
    return x, x


def shared_head(base):
    x = base(B, S, H + K, D)
    return x[:, :, :H], x[:, :, H - 1 : H - 1 + K]


def shared_token(base):
    x = base(B, 2 * S, K, D)
    return x[:, :S], x[:, S - 1 : 2 * S - 1]


def shared_channels(base):
    x = base(B, S, H, 2 * D)
    return x[..., :D], x[..., D - 1 : 2 * D - 1]


def shared_through_a_transpose(base):
    x = base(B, S, S, D)
    return x, x.transpose(1, 2)


def k_inside_q(base):
    x = base(B, S, H, D)
    return x, x[:, :, 1:3]


def one_element_of_one_odd_stride(base):
    x = base(B * S * H * D + 40)
    q = x.as_strided((B, S, 1, D), (S * 32, 32, 32, 1), 0)
    k = x.as_strided((B, S, 1, D), (S * 32, 32, 32, 1), 17)  # q has 0-15, k 17-32: meets at 32
    return q, k


OVERLAPS = [
    same_tensor,
    shared_head,
    shared_token,
    shared_channels,
    shared_through_a_transpose,
    k_inside_q,
    one_element_of_one_odd_stride,
]


@pytest.mark.parametrize("rotation", [name for name in IN_PLACE if name in OF_PAIRS])
@pytest.mark.parametrize("make", OVERLAPS, ids=lambda function: function.__name__)
def test_q_and_k_that_overlap_are_refused_in_place(make, rotation, device):
    arguments = good_arguments(device)
    arguments["q"], arguments["k"] = make(lambda *shape: random(*shape, device=device))
    expected = "q and k to share no memory, as both are written"
    expect_refusal(rotation, arguments, expected, "overlapping")


def interleaved_tokens(base):
    x = base(B, 2 * S, K, D)
    return x[:, ::2], x[:, 1::2]


def interleaved_heads(base):
    x = base(B, S, 2 * K, D)
    return x[:, :, ::2], x[:, :, 1::2]


def channels_side_by_side(base):
    x = base(B, S, H, 2 * D)
    return x[..., :D], x[..., D:]


def packed_qkv(base):
    x = base(B, S, 3, H, D)
    return x[:, :, 0], x[:, :, 1]


def packed_qkv_bhsd(base):
    x = base(B, 3, H, S, D)
    return x[:, 0].transpose(1, 2), x[:, 1].transpose(1, 2)


def k_before_q(base):
    x = base(B, S, K + H, D)
    return x[:, :, K:], x[:, :, :K]


def batches_of_one_allocation(base):
    x = base(2 * B, S, H, D)
    return x[:B], x[B:]


DISJOINT = [
    interleaved_tokens,
    interleaved_heads,
    channels_side_by_side,
    packed_qkv,
    packed_qkv_bhsd,
    k_before_q,
    batches_of_one_allocation,
]


@pytest.mark.parametrize("make", DISJOINT, ids=lambda function: function.__name__)
def test_q_and_k_of_one_allocation_without_overlap_are_accepted_in_place(make, device):
    q, k = make(lambda *shape: random(*shape, device=device))
    cos, sin = random_table(S, P, device=device)
    expected = rounded_once(q, cos, sin), rounded_once(k, cos, sin)
    rope.apply_rotary_qk_(q, k, cos, sin)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


@pytest.mark.parametrize("view", VIEWS)
def test_overlap_of_q_and_k_is_found_in_every_layout(view, device):
    q = VIEWS[view](lambda *shape: random(*shape, device=device), B, S, H, D)
    arguments = {**good_arguments(device), "q": q, "k": q[:, :, :1]}
    expect_refusal("rope::apply_rotary_qk_", arguments, "q and k to share no memory", "overlapping")


@pytest.mark.parametrize("rotation", IN_PLACE)
@pytest.mark.parametrize("argument", ["cos", "sin", "position_ids"])
def test_table_or_positions_within_x_are_refused_in_place(argument, rotation, device):
    arguments = good_arguments(device)
    if argument == "position_ids":
        arguments["position_ids"] = torch.zeros(B, S, dtype=torch.int64).to(device)
        memory = torch.zeros(B * S * H * D // 2, dtype=torch.int64).to(device)
        arguments["q"] = memory.view(torch.float32).view(B, S, H, D)
        arguments["position_ids"] = memory[: B * S].view(B, S)
    else:
        memory = arguments["q"].view(-1)
        arguments[argument] = memory[: L * P].view(L, P)
    expected = f"{argument} to share no memory with {{x}}, which is written"
    expect_refusal(rotation, arguments, expected, "overlapping")


# ---- cos_sin and cos_sin_cache


def inv_freq(device):
    return rope_ext.frequencies.default(D, device=device)[0]


TABLE_FUNCTIONS = {
    "operator": (rope.cos_sin_cache, rope.cos_sin),
    "function": (rope_ext.cos_sin_cache, rope_ext.cos_sin),
}
INV_FREQ = [
    (lambda f: f[None], "inv_freq to have shape [P]", f"[1, {P}]"),
    (lambda f: f[0], "inv_freq to have shape [P]", "[]"),
    (lambda f: f.int(), "inv_freq to be float64, float32, float16 or bfloat16", "int32"),
]


@pytest.mark.parametrize("called", TABLE_FUNCTIONS)
@pytest.mark.parametrize(("change", "expected", "got"), INV_FREQ, ids=["rank 2", "rank 0", "int"])
def test_bad_inv_freq_is_refused(change, expected, got, called, device):
    cache, rows = TABLE_FUNCTIONS[called]
    bad = change(inv_freq(device))
    ids = torch.arange(3).to(device)
    for name, call in (
        ("cos_sin_cache", lambda: cache(bad, 3)),
        ("cos_sin", lambda: rows(bad, ids)),
    ):
        message = re.escape(f"rope::{name}: expected {expected}, got {got}")
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("called", TABLE_FUNCTIONS)
def test_bad_length_start_dtype_and_positions_are_refused(called, device):
    cache, rows = TABLE_FUNCTIONS[called]
    f, ids = inv_freq(device), torch.arange(3).to(device)
    prefix = "rope::" if called == "operator" else "rope_ext."
    for call, message in [
        (lambda: cache(f, -1), "rope::cos_sin_cache: expected length to be at least 0, got -1"),
        (lambda: cache(f, 3, start=2**53), "rope::cos_sin_cache: expected start"),
        (lambda: cache(f, 3, start=-(2**63)), "rope::cos_sin_cache: expected start"),
        (lambda: cache(f, 3, dtype=torch.int32), f"{prefix}cos_sin_cache: expected dtype to be "
         "float64, float32, float16 or bfloat16, got int32"),
        (lambda: rows(f, ids, dtype=torch.int64), f"{prefix}cos_sin: expected dtype to be float64, "
         "float32, float16 or bfloat16, got int64"),
        (lambda: rows(f, ids.short()), "rope::cos_sin: expected position_ids to be int32, int64, "
         "float64, float32, float16 or bfloat16, got "),
        (lambda: rows(f, ids.bool()), "rope::cos_sin: expected position_ids to be int32, int64, "
         "float64, float32, float16 or bfloat16, got bool"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()


def test_positions_on_another_device_than_inv_freq_are_refused(device):
    other = "meta" if device.type == "cpu" else "cpu"
    for f, ids in (
        (inv_freq(device), torch.arange(3, device=other)),
        (inv_freq(other), torch.arange(3).to(device)),
    ):
        with pytest.raises(
            RuntimeError, match="rope::cos_sin: expected position_ids on the device"
        ):
            rope.cos_sin(f, ids)


# ---- nothing is allocated before the refusal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_refusal_comes_before_the_outputs_are_allocated(dtype):
    arguments = good_arguments("cpu")
    q, k = arguments["q"].to(dtype), arguments["k"].to(dtype)
    cos, sin, ids = (arguments[name] for name in ("cos", "sin", "position_ids"))

    def allocations(ids):
        with torch.profiler.profile() as profile, contextlib.suppress(RuntimeError):
            rope.apply_rotary_qk(q, k, cos, sin, ids)
        return [event.name for event in profile.events() if "empty" in event.name]

    assert allocations(ids).count("aten::empty_like") == 2
    assert allocations(ids + L) == []
