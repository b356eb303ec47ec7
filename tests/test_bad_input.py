"""Every error names operator, argument, expected and got, and nothing has been written."""

import contextlib
import re
import time
from itertools import pairwise

import pytest
import torch
from operator_arguments import arguments_of
from support import (
    VIEWS,
    assert_same_bits,
    on_cpu,
    random,
    random_positions,
    random_table,
    rounded_once,
)

import rope_ext
from rope_ext import _C
from rope_ext._operators import OPERATORS

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
FUNCTIONS = [name for name in ROTATIONS if not name.startswith("rope::")]
IN_PLACE = [name for name in ROTATIONS if name.endswith(("_", "in place"))]
OF_PAIRS = [name for name in ROTATIONS if "qk" in name]

Q, KEYS, (COS, SIN) = random(B, S, H, D), random(B, S, K, D), random_table(L, P)
IDS = random_positions(B, S, rows=L)
GOOD = {"q": Q, "k": KEYS, "cos": COS, "sin": SIN, "position_ids": IDS}
NO_IDS = {"position_ids": None}


def operator_of(rotation):
    """The operator that a rotation calls."""
    if rotation in FUNCTIONS:
        return f"rope::{rotation.replace(' in place', '_')}"
    return rotation


def rotate(rotation, arguments):
    arguments = dict(arguments)
    if rotation in FUNCTIONS and arguments["q"].dim() == 3:
        arguments["layout"] = "thd"
    positional = [arguments.pop(name) for name in GOOD]
    if rotation not in OF_PAIRS:
        del positional[1]
    return ROTATIONS[rotation](*positional, **arguments)


def bytes_of(t):
    """All bytes of t's memory, on its device."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def placed(arguments, device):
    """Copies of the tensors on the device, with their strides, that share memory as they do."""
    memory = {}

    def copied(t):
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        key = t.untyped_storage().data_ptr()
        if key not in memory:
            memory[key] = bytes_of(t).to(device, copy=True)
        return memory[key].view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())

    return {name: copied(t) for name, t in arguments.items()}


def refusal(rotation, arguments):
    """The message. No tensor may have changed."""
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    kept = [bytes_of(t).clone() for t in tensors if not t.is_meta]
    versions = [t._version for t in tensors]
    try:
        rotate(rotation, arguments)
    except (RuntimeError, ValueError) as error:
        said = str(error)
    else:
        raise AssertionError(f"{rotation} was not refused")
    for t, before in zip([t for t in tensors if not t.is_meta], kept, strict=True):
        assert torch.equal(bytes_of(t), before), f"{rotation} has written, then: {said}"
    assert [t._version for t in tensors] == versions, f"{rotation} has counted, then: {said}"
    return said


def assert_refused(change, expected, got, device, *, rotations=ROTATIONS, by=operator_of):
    """{x} in `expected` is x or q; the error may go on after `got`."""
    for rotation in rotations:
        said = refusal(rotation, placed({**GOOD, **change}, device))
        x = "q" if rotation in OF_PAIRS else "x"
        assert said.startswith(f"{by(rotation)}: expected {expected.format(x=x)}"), said
        assert f", got {got}" in said


# ---- the arguments of every rotation


def wide(t):
    """t's shape, with stride 2 in the last dimension."""
    return torch.cat((t, t), -1)[..., ::2]


def table(*shape):
    return dict(zip(("cos", "sin"), random_table(*shape), strict=True))


def ids(*shape, dtype=torch.int64):
    return {"position_ids": torch.zeros(shape, dtype=dtype)}


PACKED = {"q": Q[0], "k": KEYS[0], **table(L, P), **ids(S)}
DTYPES = "float64, float32, float16 or bfloat16"
STRIDE = "to have stride 1 in its last dimension"
ROTARY_DIM = "to be even, at least 2 and at most head_dim 16"
OFFSET = "rotary_offset to be at least 0 and at most head_dim - rotary_dim, 16"
SHAPE = f"cos to have shape [L, {P}]"
A_ROW = f"cos to have a row for each of the {S} positions"

REFUSED = {  # expected: got: the change of the good arguments
    f"{{x}} to be {DTYPES}": {
        "int64": {"q": Q.long(), "k": KEYS.long()},
        "float8_e4m3fn": {"q": Q.to(torch.float8_e4m3fn)},
        "complex64": {"q": Q.to(torch.complex64)},
    },
    f"{{x}} {STRIDE}": {
        f"strides [{2 * S * H * D}, {2 * H * D}, {2 * D}, 2]": {"q": wide(Q)},
        f"strides [{S * H * D}, {H * D}, {D}, 0]": {"q": Q[..., :1].expand(B, S, H, D)},
    },
    f"rotary_dim {ROTARY_DIM}": {str(dim): {"rotary_dim": dim} for dim in (15, 18, 0, -2)},
    f"rotary_dim, twice the width of cos, {ROTARY_DIM}": {"18": table(L, 9), "0": table(L, 0)},
    f"{OFFSET} - 16": {str(first): {"rotary_offset": first} for first in (-1, 1, 2**63 - 1)},
    f"{OFFSET} - 12": {"5": {"rotary_offset": 5, "rotary_dim": 12, **table(L, 6)}},
    f"cos to be {DTYPES}": {"int32": {"cos": COS.int(), "sin": SIN.int()}},
    f"cos {STRIDE}": {f"strides [{2 * P}, 2]": {"cos": wide(COS)}},
    f"sin {STRIDE}": {f"strides [{2 * P}, 2]": {"sin": wide(SIN)}},
    "sin of cos's dtype float32": {"float64": {"sin": SIN.double()}},
    f"sin of cos's shape [{L}, {P}]": {
        f"[8, {P}]": {"sin": SIN[1:]},
        f"[{L}, 7]": {"sin": SIN[:, 1:]},
    },
    "cos to have shape [L, 8|16]": {  # neither half of rotary_dim nor all of it
        f"[{L}, {width}]": {"rotary_dim": 16, **table(L, width)} for width in (7, 12)
    },
    "cos to have shape [L, W] or [1|B, S, W]": {
        f"[{P}]": table(P),
        f"[1, 1, {L}, {P}]": table(1, 1, L, P),
    },
    SHAPE: {  # beside positions
        f"[{B}, {S}, {P}]": table(B, S, P),
        f"[1, {S}, {P}]": {**PACKED, **table(1, S, P)},
    },
    f"{SHAPE} or [1|B, S, {P}]": {
        f"[{B}, {S - 2}, {P}]": {**table(B, S - 2, P), **NO_IDS},
        f"[{B + 1}, {S}, {P}]": {**table(B + 1, S, P), **NO_IDS},
    },
    f"{SHAPE} or [1, T, {P}] with T = {S}": {
        f"[2, {S}, {P}]": {**PACKED, **table(2, S, P), **NO_IDS}
    },
    A_ROW: {
        f"[{S - 2}, {P}]": {**table(S - 2, P), **NO_IDS},
        f"[{S - 1}, {P}]": {**PACKED, **table(S - 1, P), **NO_IDS},
    },
    "position_ids to be int32 or int64": {
        "float32": {"position_ids": IDS.float()},
        "bool": {"position_ids": IDS.bool()},
        "int16": {"position_ids": IDS.short()},
    },
    f"position_ids to have shape [S] or [1|B, S] with B = {B}, S = {S}": {
        str(list(shape)): ids(*shape)
        for shape in ((B, S - 2), (B + 1, S), (S, B), (B,), (1,), (), (1, B, S))
    },
    f"position_ids to have shape [T] with T = {S}": {
        f"[1, {S}]": {**PACKED, **ids(1, S)},
        f"[{S - 1}]": {**PACKED, **ids(S - 1)},
    },
    f"k to have q's shape [{B}, {S}, {H}, {D}] in all but the number of heads": {
        str(list(shape)): {"k": random(*shape)}
        for shape in ((B + 1, S, K, D), (B, S + 1, K, D), (B, S, K, D + 2))
    },
    "k of q's dtype float32": {"bfloat16": {"k": KEYS.bfloat16()}},
    f"k to be {DTYPES}": {"int32": {"k": KEYS.int()}},
    f"k {STRIDE}": {f"strides [{2 * S * K * D}, {2 * K * D}, {2 * D}, 2]": {"k": wide(KEYS)}},
}


@pytest.mark.parametrize("expected", REFUSED)
def test_bad_argument_is_refused_and_nothing_written(expected, device):
    for got, change in REFUSED[expected].items():
        rotations = OF_PAIRS if {*change} == {"k"} else ROTATIONS
        assert_refused(change, expected, got, device, rotations=rotations)


def test_good_arguments_are_accepted(device):
    """Otherwise the errors would prove nothing. The first and the last row are among those used."""
    ends = torch.tensor([[0, L - 1, 0, L - 1, 0]]).expand(B, S)
    for change in ({}, NO_IDS, {"position_ids": ends}, PACKED):
        for rotation in ROTATIONS:
            arguments = placed({**GOOD, **change}, device)
            expected = rounded_once(*on_cpu([t for n, t in arguments.items() if n != "k"]))
            result = rotate(rotation, arguments)
            result = result[0] if isinstance(result, tuple) else result
            assert_same_bits(arguments["q"] if result is None else result, expected, rotation)


def test_wrong_rank_is_refused_and_nothing_written(device):
    """The functions check the layout first."""
    either = "{x} to have shape [B, S, H, D] or [T, H, D]"
    of_q = f"k to have q's shape [{B}, {S}, {H}, {D}]"
    for change, expected, got in (
        ({"q": Q[0, 0, 0]}, either, [D]),
        ({"q": Q[0, 0]}, either, [H, D]),
        ({"q": Q[None]}, either, [1, B, S, H, D]),
        ({"k": KEYS[0]}, of_q, [S, K, D]),
    ):
        rotations = OF_PAIRS if "k" in change else ROTATIONS
        operators = [r for r in rotations if r not in FUNCTIONS]
        assert_refused(change, expected, got, device, rotations=operators)
        functions = [r for r in rotations if r in FUNCTIONS]
        expected = f"{expected.split()[0]} to have shape [B, S, H, D] (layout 'bshd')"
        assert_refused(change, expected, got, device, rotations=functions, by=name_of_function)


def name_of_function(rotation):
    return f"rope_ext.{rotation.removesuffix(' in place')}"


def test_layout_that_does_not_fit_is_refused(device):
    layouts = "layout to be one of bshd, bhsd, sbhd, thd"
    for layout, expected, got in (
        ("thd", "{x} to have shape [T, H, D] (layout 'thd')", f"[{B}, {S}, {H}, {D}]"),
        ("hbsd", layouts, "'hbsd'"),
        ("BSHD", layouts, "'BSHD'"),
        ("", layouts, "''"),
    ):
        change = {"layout": layout}
        assert_refused(change, expected, got, device, rotations=FUNCTIONS, by=name_of_function)


def test_another_order_of_the_pairs_is_refused_in_place(device):
    """An in-place rotation writes its pairs to where it read them."""

    def by(rotation):
        return name_of_function(rotation) if rotation in FUNCTIONS else rotation

    for order in (False, True):
        change = {"interleaved": order, "interleaved_out": not order}
        expected = f"interleaved_out to be None or interleaved, {order}"
        assert_refused(change, expected, not order, device, rotations=IN_PLACE, by=by)


@pytest.mark.parametrize("function", [rope_ext.apply_rotary, rope_ext.apply_rotary_qk])
def test_another_order_of_the_pairs_is_refused_in_place_under_compile(function):
    """A graph with gradients rotates out of place, so this would be possible there."""

    @torch.compile(backend="eager", fullgraph=True)
    def rotate(q):
        xs = [q * 1, q * 2] if function is rope_ext.apply_rotary_qk else [q * 1]
        return function(*xs, COS, SIN, interleaved_out=True, inplace=True)

    with pytest.raises(Exception, match="expected interleaved_out to be None or interleaved"):
        rotate(random(B, S, H, D).requires_grad_())


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
IN_TABLE = f"position_ids in [0, {L}), the rows of cos and sin"


def with_position(value, at, dtype):
    ids = IDS.to(dtype, copy=True)
    ids[at] = value
    return {"position_ids": ids}


@pytest.mark.parametrize(("value", "at", "dtype"), OUTSIDE)
def test_position_outside_the_table_raises_and_writes_nothing(value, at, dtype):
    at_index = f"{value} at index [{at[0]}, {at[1]}]"
    assert_refused(with_position(value, at, dtype), IN_TABLE, at_index, "cpu")


def test_position_outside_is_named_by_its_index_in_every_shape():
    ids = torch.tensor([0, 1, 2, L, -1])
    for change, at in (
        ({"position_ids": ids}, "[3]"),
        ({"position_ids": ids[None]}, "[0, 3]"),
        ({**PACKED, "position_ids": ids}, "[3]"),
    ):
        assert_refused(change, IN_TABLE, f"{L} at index {at}", "cpu")


def test_positions_of_no_token_are_looked_at_in_no_time():
    arguments = {**GOOD, **{x: torch.empty(2**33, 0, H, D) for x in "qk"}}
    arguments["position_ids"] = torch.empty(2**33, 0, dtype=torch.int64)
    start = time.monotonic()
    rotate("rope::apply_rotary_qk", arguments)
    assert time.monotonic() - start < 1  # a loop over 2^33 sequences takes seconds


@pytest.mark.cuda
@pytest.mark.parametrize(("value", "at", "dtype"), OUTSIDE)
def test_position_outside_the_table_gives_a_nan_row_on_cuda(value, at, dtype):
    change = {**with_position(value, at, dtype), **table(L, P - 2)}
    inside = {**change, **with_position(0, at, dtype)}
    rows = [inside[name] for name in ("cos", "sin", "position_ids")]
    expected = [rounded_once(x, *rows) for x in (Q, KEYS)]
    for e in expected:
        e[at][:, : 2 * (P - 2)] = float("nan")  # channels past rotary_dim stay
    for rotation in ROTATIONS:
        arguments = placed({**GOOD, **change}, "cuda")
        result = rotate(rotation, arguments)
        result = (arguments["q"], arguments["k"]) if result is None else result
        result = result if isinstance(result, tuple) else (result,)
        for got, want in zip(result[: 1 + (rotation in OF_PAIRS)], expected, strict=False):
            assert_same_bits(got, want, rotation)


@pytest.mark.cuda
def test_position_outside_raises_on_cuda_where_asked(monkeypatch):
    monkeypatch.setenv("ROPE_EXT_CHECK", "1")
    for value, at, dtype in OUTSIDE[:4]:
        at_index = f"{value} at index [{at[0]}, {at[1]}]"
        assert_refused(with_position(value, at, dtype), IN_TABLE, at_index, "cuda")


# ---- the gradient to a table


@pytest.mark.parametrize("rotary_offset", [-1, 5])
def test_bad_rotary_offset_of_the_gradient_to_the_table_is_refused(rotary_offset, device):
    x, cos = Q.to(device), random(S, 6, device=device)
    message = f"rope::apply_rotary_table_backward: expected {OFFSET} - 12, got {rotary_offset}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        rope.apply_rotary_table_backward(x, x, None, None, cos, rotary_offset=rotary_offset)


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


def test_tensor_on_another_device_is_refused_and_nothing_written(device):
    """The meta device replaces the other device on a machine without a GPU."""
    other, here = ("meta", "cpu") if device.type == "cpu" else ("cpu", "cuda:0")
    for rotation in ROTATIONS:
        for name in ("k", "cos", "sin", "position_ids"):
            if name == "k" and rotation not in OF_PAIRS:
                continue
            arguments = placed(GOOD, device)
            arguments[name] = arguments[name].to(other)
            x = "q" if rotation in OF_PAIRS else "x"
            expected = f"{operator_of(rotation)}: expected {name} on the device of {x}, {here}"
            assert refusal(rotation, arguments).startswith(expected)


def test_table_on_another_device_is_refused_by_the_kernel():
    """The kernel's own check, after the dispatcher's choice of a kernel."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    q, k, cos, sin = Q.clone(), KEYS.clone(), COS.to("meta"), SIN.to("meta")
    for operator, xs in ((rope.apply_rotary, [q]), (rope.apply_rotary_qk_, [q, k])):
        with pytest.raises(RuntimeError, match="expected cos on the device of"):
            operator.default.redispatch(keys, *xs, cos, sin)
    assert_same_bits(q, Q)


@pytest.mark.skipif(_C.build_info()["cuda"], reason="built with CUDA")
def test_cuda_tensor_with_a_build_without_cuda_says_so(monkeypatch):
    """The CUDA kernel is called directly: meta tensors replace CUDA tensors."""
    monkeypatch.setenv("ROPE_EXT_FALLBACK", "error")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for operator in OPERATORS:
        given = arguments_of(operator)
        given = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in given.items()}
        positional = [given.pop(name, None) for name in operator.positional]
        with pytest.raises(RuntimeError, match=f"{operator.op}: built without CUDA: ."):
            operator.overload.redispatch(keys, *positional, **given)


# ---- memory that is written twice, or read after a write


LINE = random(4 * B * S * H * D)
HEADS, TOKENS = LINE[: B * S * 6 * D].view(B, S, 6, D), LINE[: 2 * B * S * D].view(B, 2 * S, 1, D)
WIDE, SQUARE = LINE[: 2 * Q.numel()].view(B, S, H, 2 * D), LINE[: B * S * S * D].view(B, S, S, D)
SHARED = LINE[: Q.numel()].view(Q.shape)
LONGS = torch.zeros(Q.numel() // 2, dtype=torch.int64)

SELF = "{x} to have no two elements in one place, as it is written"
READ = "to share no memory with {x}, which is written"
WRITTEN_TWICE = {  # the change of the good arguments, expected, got
    "a batch for all": ({"q": Q[:1].expand(Q.shape)}, SELF, f"strides [0, {H * D}, {D}, 1]"),
    "a token for all": ({"q": Q[:, :1].expand(Q.shape)}, SELF, f"strides [{S * H * D}, 0, {D}, 1]"),
    "a head for all": ({"q": Q[:, :, :1].expand(Q.shape)}, SELF, "strides"),
    "windows, as from unfold": ({"q": LINE.as_strided(Q.shape, (80, 16, 8, 1))}, SELF, "strides"),
    "cos in x": ({"q": SHARED, "cos": LINE[: L * P].view(L, P)}, f"cos {READ}", "overlapping"),
    "sin in x": ({"q": SHARED, "sin": LINE[: L * P].view(L, P)}, f"sin {READ}", "overlapping"),
    "positions in x": (
        {"q": LONGS.view(torch.float32).view(Q.shape), "position_ids": LONGS[: B * S].view(B, S)},
        f"position_ids {READ}",
        "overlapping",
    ),
}
OVERLAPPING = {  # q and k
    "same tensor": (SHARED, SHARED),
    "shared head": (HEADS[:, :, :H], HEADS[:, :, H - 1 : H + 1]),
    "shared token": (TOKENS[:, :S], TOKENS[:, S - 1 : -1]),
    "shared channel": (WIDE[..., :D], WIDE[..., D - 1 : -1]),
    "through a transpose": (SQUARE, SQUARE.transpose(1, 2)),
    "k inside q": (SHARED, SHARED[:, :, 1:3]),
    # q has 0-15, k 17-32: they meet at 32
    "one element of one odd stride": (
        LINE.as_strided((B, S, 1, D), (S * 32, 32, 32, 1), 0),
        LINE.as_strided((B, S, 1, D), (S * 32, 32, 32, 1), 17),
    ),
    **{
        f"k inside q, {view}": ((q := make(random, B, S, H, D)), q[:, :, :1])
        for view, make in VIEWS.items()
    },
}
PACKED_QKV = LINE[: 3 * Q.numel()].view(B, S, 3, H, D)
DISJOINT = {
    "interleaved tokens": (TOKENS[:, ::2], TOKENS[:, 1::2]),
    "interleaved heads": (HEADS[:, :, ::2], HEADS[:, :, 1::2]),
    "channels side by side": WIDE.chunk(2, -1),
    "packed qkv": PACKED_QKV.unbind(2)[:2],
    "packed qkv, bhsd": LINE[: 3 * Q.numel()].view(B, 3, H, S, D).transpose(2, 3).unbind(1)[:2],
    "k before q": (HEADS[:, :, K:], HEADS[:, :, :K]),
    "batches of one allocation": LINE.view(2 * B, 2 * S, H, D)[:, :S].chunk(2),
}


@pytest.mark.parametrize("case", WRITTEN_TWICE)
def test_memory_that_is_written_twice_or_read_is_refused_in_place(case, device):
    assert_refused(*WRITTEN_TWICE[case], device, rotations=IN_PLACE)


def test_expanded_k_is_refused_in_place(device):
    change = {"k": KEYS[:, :, :1].expand(KEYS.shape)}
    expected = "k to have no two elements in one place"
    rotations = [name for name in IN_PLACE if name in OF_PAIRS]
    assert_refused(change, expected, "strides", device, rotations=rotations)


@pytest.mark.parametrize("case", OVERLAPPING)
def test_q_and_k_that_overlap_are_refused_in_place(case, device):
    change = dict(zip("qk", OVERLAPPING[case], strict=True))
    expected = "q and k to share no memory, as both are written"
    rotations = [name for name in IN_PLACE if name in OF_PAIRS]
    assert_refused(change, expected, "overlapping", device, rotations=rotations)


def test_q_and_k_of_one_allocation_without_overlap_are_accepted_in_place(device):
    for case, (q, k) in DISJOINT.items():
        given = placed({"q": q, "k": k, **table(S, P)}, device)
        expected = [rounded_once(given[x], given["cos"], given["sin"]) for x in "qk"]
        rope.apply_rotary_qk_(**given)
        assert_same_bits(given["q"], expected[0], case)
        assert_same_bits(given["k"], expected[1], case)


# ---- cos_sin and cos_sin_cache


FREQUENCIES = torch.ones(P)
TABLES = {
    "cos_sin_cache": {"inv_freq": FREQUENCIES, "length": 3},
    "cos_sin": {"inv_freq": FREQUENCIES, "position_ids": torch.arange(3)},
}
ANY_POSITIONS = f"position_ids to be int32, int64, {DTYPES}"
REFUSED_TABLES = [
    *(
        (name, *case)
        for name in TABLES
        for case in (
            ({"inv_freq": FREQUENCIES[None]}, "inv_freq to have shape [P]", f"[1, {P}]"),
            ({"inv_freq": FREQUENCIES[0]}, "inv_freq to have shape [P]", "[]"),
            ({"inv_freq": FREQUENCIES.int()}, f"inv_freq to be {DTYPES}", "int32"),
            ({"dtype": torch.int32}, f"dtype to be {DTYPES}", "int32"),
        )
    ),
    ("cos_sin_cache", {"length": -1}, "length to be at least 0", "-1"),
    ("cos_sin_cache", {"start": 2**53}, "start", ""),
    ("cos_sin_cache", {"start": -(2**63)}, "start", ""),
    ("cos_sin", ids(3, dtype=torch.int16), ANY_POSITIONS, ""),
    ("cos_sin", ids(3, dtype=torch.bool), ANY_POSITIONS, "bool"),
]


@pytest.mark.parametrize("functions", [rope, rope_ext], ids=["operators", "functions"])
def test_bad_arguments_of_tables_are_refused(functions, device):
    for name, change, expected, got in REFUSED_TABLES:
        of_function = functions is rope_ext and "dtype" in change
        called = f"rope_ext.{name}" if of_function else f"rope::{name}"
        message = f"^{called}: expected {re.escape(expected)}.*, got {re.escape(got)}"
        with pytest.raises(RuntimeError, match=message):
            getattr(functions, name)(**placed({**TABLES[name], **change}, device))


def test_positions_on_another_device_than_inv_freq_are_refused(device):
    other = "meta" if device.type == "cpu" else "cpu"
    for f, ids in (
        (torch.ones(P, device=device), torch.arange(3, device=other)),
        (torch.ones(P, device=other), torch.arange(3).to(device)),
    ):
        with pytest.raises(RuntimeError, match="cos_sin: expected position_ids on the device"):
            rope.cos_sin(f, ids)


# ---- nothing is allocated before the refusal


def test_refusal_comes_before_the_outputs_are_allocated():
    def allocations(dtype, ids):
        with torch.profiler.profile() as profile, contextlib.suppress(RuntimeError):
            rope.apply_rotary_qk(Q.to(dtype), KEYS.to(dtype), COS, SIN, ids)
        return [event.name for event in profile.events() if "empty_like" in event.name]

    for dtype in (torch.float32, torch.bfloat16):
        assert allocations(dtype, IDS) == 2 * ["aten::empty_like"], dtype
        assert allocations(dtype, IDS + L) == [], dtype
