"""Random shapes, strides, dtypes, tables and positions, and the properties that hold for all."""

import functools
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    assert_near_exact,
    assert_same_bits,
    inverse_of,
    random,
    random_positions,
    rounded_once,
)

from rope_ext import _C

rope = torch.ops.rope

EXAMPLES = 250
GUARD = 24  # elements before and after all data that must not be written
settings.register_profile("rope", deadline=None, derandomize=True, database=None,
                          max_examples=EXAMPLES)  # fmt: skip
settings.load_profile("rope")


@dataclass
class Input:
    """A rotation of one tensor: its memory, the view of it, and the other arguments."""

    memory: torch.Tensor
    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    options: dict
    capability: str


@st.composite
def strided(draw, shape, dtype, seed):
    """A view without overlaps of `shape`, last stride 1, in guarded memory: dimensions in any order
    in memory, gaps between them, any offset.
    """
    order = draw(st.permutations(range(len(shape) - 1)))
    strides = [1] * len(shape)
    extent = shape[-1]
    for dim in order:
        strides[dim] = extent + draw(st.sampled_from([0, 0, 0, 1, 8, 13]))
        extent = strides[dim] * max(shape[dim], 1)
    for dim in order:
        if shape[dim] == 1 and draw(st.integers(0, 4)) == 0:
            strides[dim] = draw(st.sampled_from([0, 1, 2**31, 2**62]))  # of one element: never used
    offset = GUARD + draw(st.integers(0, 9))
    memory = random(offset + extent + GUARD, dtype=dtype, seed=seed)
    return memory, memory.as_strided(shape, strides, offset)


@st.composite
def inputs(draw):
    dtype, table_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(0, 4))
    seq, heads = draw(st.integers(0, 9)), draw(st.integers(0, 6))
    pairs, before, after = (
        draw(st.integers(1, 41)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 5)),
    )
    seed = draw(st.integers(0, 1000))
    tokens = (seq,) if packed else (batch, seq)
    memory, x = draw(strided((*tokens, heads, before + 2 * pairs + after), dtype, seed))

    options = {"interleaved": draw(st.booleans()), "inverse": draw(st.booleans())}
    options["interleaved_out"] = draw(st.sampled_from([None, False, True]))
    options["rotary_offset"] = before
    width = pairs
    if draw(st.booleans()):
        options["rotary_dim"] = 2 * pairs
        width = draw(st.sampled_from([pairs, 2 * pairs]))
    kinds = ["table", "looked up"] + ([] if packed else ["rows for all", "rows per token"])
    kind = draw(st.sampled_from(kinds))
    rows = seq + draw(st.integers(1, 5))
    shape = {"rows for all": (1, seq, width), "rows per token": (batch, seq, width)}.get(
        kind, (rows, width)
    )
    cos = draw(strided(shape, table_dtype, seed + 1))[1]
    sin = draw(strided(shape, table_dtype, seed + 2))[1]
    ids = None
    if kind == "looked up":
        ids_shapes = [(seq,)] if packed else [(seq,), (1, seq), (batch, seq)]
        ids = random_positions(
            *draw(st.sampled_from(ids_shapes)),
            rows=rows,
            dtype=draw(st.sampled_from([torch.int32, torch.int64])),
            seed=seed,
        )
    return Input(memory, x, cos, sin, ids, options, draw(st.sampled_from(["avx2", "portable"])))


def with_capability(function):
    """Runs function with the CPU kernels that its input names, if the processor has them."""

    @functools.wraps(function)
    def wrapped(case, **others):
        before = _C.build_info()["cpu_capability"]
        try:
            _C.set_cpu_capability(case.capability)
        except RuntimeError:
            _C.set_cpu_capability("portable")
        try:
            function(case, **others)
        finally:
            _C.set_cpu_capability(before)

    return wrapped


@given(case=inputs())
@with_capability
def test_any_rotation_is_exact_and_writes_no_input(case):
    kept = case.memory.clone()
    y = rope.apply_rotary(case.x, case.cos, case.sin, case.position_ids, **case.options)
    arguments = (case.x, case.cos, case.sin, case.position_ids)
    assert_same_bits(y, rounded_once(*arguments, **case.options))
    if case.x.dtype != torch.float64 and case.x.numel() > 0:
        assert_near_exact(y, *arguments, **case.options)
    assert_same_bits(case.memory, kept)


@given(case=inputs())
@with_capability
def test_any_rotation_in_place_writes_its_view_alone(case):
    arguments = (case.cos, case.sin, case.position_ids)
    options = {**case.options, "interleaved_out": None}
    expected = case.memory.clone()
    view = expected.as_strided(case.x.shape, case.x.stride(), case.x.storage_offset())
    view.copy_(rounded_once(case.x, *arguments, **options))
    rope.apply_rotary_(case.x, *arguments, **options)
    assert_same_bits(case.memory, expected)


@given(case=inputs(), data=st.data())
@with_capability
def test_any_rotation_into_out_writes_its_view_alone(case, data):
    arguments = (case.x, case.cos, case.sin, case.position_ids)
    memory, out = data.draw(strided(case.x.shape, case.x.dtype, seed=9))
    expected = memory.clone()
    view = expected.as_strided(out.shape, out.stride(), out.storage_offset())
    view.copy_(rounded_once(*arguments, **case.options))
    kept = case.memory.clone()
    rope.apply_rotary.out(*arguments, **case.options, out=out)
    assert_same_bits(memory, expected)
    assert_same_bits(case.memory, kept)


@given(case=inputs())
@with_capability
def test_any_gradient_to_x_is_the_transposed_rotation(case):
    x = case.x.detach().requires_grad_()
    y = rope.apply_rotary(x, case.cos, case.sin, case.position_ids, **case.options)
    seed = random(*y.shape, dtype=y.dtype, seed=5)
    (grad,) = torch.autograd.grad(y, x, seed)
    back = inverse_of(case.options)
    assert_same_bits(grad, rounded_once(seed, case.cos, case.sin, case.position_ids, **back))


@st.composite
def two_views(draw):
    """Two views [B, S, H, D] of one memory, with or without overlap."""
    memory = torch.arange(2000, dtype=torch.float32)
    views = []
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim = draw(st.sampled_from([2, 4, 6]))
    for _ in range(2):
        shape = (batch, seq, draw(st.integers(1, 3)), dim)
        order = draw(st.permutations(range(3)))
        strides, extent = [0, 0, 0, 1], dim
        for d in order:
            strides[d] = extent + draw(st.sampled_from([0, 0, 1, 2, dim, 3 * dim]))
            extent = strides[d] * shape[d]
        views.append(memory.as_strided(shape, strides, draw(st.integers(0, 60))))
    return memory, *views


@settings(max_examples=600)
@given(case=two_views())
def test_q_and_k_in_place_are_refused_exactly_when_they_share_an_element(case):
    memory, q, k = case
    share = bool(set(q.flatten().tolist()) & set(k.flatten().tolist()))
    kept = memory.clone()
    cos, sin = torch.zeros(3, q.shape[-1] // 2), torch.ones(3, q.shape[-1] // 2)
    try:
        rope.apply_rotary_qk_(q, k, cos, sin)
    except RuntimeError as error:
        assert share, f"refused {q.shape} {q.stride()} and {k.shape} {k.stride()} without reason"
        assert "share no memory" in str(error)  # noqa: PT017
        assert torch.equal(memory, kept)
    else:
        assert not share
        assert not torch.equal(memory, kept)
