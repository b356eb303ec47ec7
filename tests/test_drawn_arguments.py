"""Arguments drawn independently, so that they fit each other or not: the right numbers, or an error
that gives the reason exactly if they do not fit; nothing but the result is written.
tests/attack draws arguments of all operators that fit, and invalid ones.
"""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_same_bits, random, random_positions, rounded_once

rope = torch.ops.rope

settings.register_profile("drawn", deadline=None, derandomize=True, database=None)
settings.load_profile("drawn")

OUTSIDE = (-1, -(2**31), 2**31 - 1, 2**31, 2**32, -(2**63), 2**63 - 1)


def fits(x, cos, sin, position_ids, rotary_dim=None, rotary_offset=0, **_):
    """The rules of the README and of apply_rotary's docstring, implemented again."""
    *batch, S, _, D = x.shape
    rows, width = cos.shape[-2:]
    R = 2 * width if rotary_dim is None else rotary_dim
    table = cos.dim() == 2 and (position_ids is not None or rows >= S)
    per_token = cos.dim() == 3 and position_ids is None and rows == S
    looked_up = position_ids is None or (
        list(position_ids.shape) in ([S], *([[1, S], [*batch, S]] if batch else []))
        and bool(((position_ids >= 0) & (position_ids < rows)).all())
    )
    return (
        R % 2 == 0
        and 2 <= R <= D
        and 0 <= rotary_offset <= D - R
        and width in (R // 2, R)
        and cos.shape == sin.shape
        and cos.dtype == sin.dtype
        and bool(table or (per_token and cos.shape[0] in (1, *batch)))
        and looked_up
    )


@st.composite
def arguments(draw):
    """x, cos, sin, position_ids, options: each fits the others often, but not always."""

    def usually(value, *others):
        return draw(st.sampled_from([value] * (12 * len(others)) + list(others)))

    packed = draw(st.booleans())
    B, S, H, pairs = (draw(st.integers(low, 4)) for low in (0, 0, 0, 1))
    options = {"interleaved": draw(st.booleans()), "inverse": draw(st.booleans())}
    options["rotary_offset"] = usually(0, -1, 1, 2, 5, 2**63 - 1)
    D = 2 * pairs + draw(st.integers(0, 3))
    x = random(*([] if packed else [B]), S, H, D, dtype=draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        options["rotary_dim"] = usually(2 * pairs, 0, -2, 2 * pairs + 1, 2 * pairs + 2, 2**62)
    width = draw(st.sampled_from([pairs, pairs, 2 * pairs, pairs + 1]))
    rows = draw(st.integers(max(S - 1, 0), S + 3))
    per_token = [draw(st.integers(1, 3)), usually(S, rows), width]
    table = draw(st.sampled_from([[rows, width], [rows, width], per_token]))
    dtype = draw(st.sampled_from(DTYPES))
    cos = random(*table, dtype=dtype, seed=1)
    sin = random(*usually(table, [*table[:-1], width + 1]), dtype=usually(dtype, *DTYPES), seed=2)
    ids = None
    if draw(st.booleans()):
        shapes = [[S], [1, S], [B, S], [S + 1], [B + 1, S], [S, B]]
        of = draw(st.sampled_from([torch.int32, torch.int64]))
        ids = random_positions(*draw(st.sampled_from(shapes)), rows=max(rows, 1), dtype=of)
        if ids.numel() and usually(False, True, True):
            least, most = torch.iinfo(of).min, torch.iinfo(of).max
            outside = [p for p in (rows, *OUTSIDE) if least <= p <= most]
            ids.view(-1)[draw(st.integers(0, ids.numel() - 1))] = draw(st.sampled_from(outside))
    return x, cos, sin, ids, options


@settings(max_examples=300)
@given(case=arguments(), form=st.sampled_from(["new", "in place", "out"]))
def test_refused_exactly_where_the_arguments_do_not_fit(case, form):
    x, cos, sin, ids, options = case
    inputs = [t for t in (x, cos, sin, ids) if t is not None]
    kept = [t.clone() for t in inputs]
    out = torch.full_like(x, 7)

    def rotate():
        if form == "new":
            return rope.apply_rotary(x, cos, sin, ids, **options)
        if form == "out":
            rope.apply_rotary.out(x, cos, sin, ids, **options, out=out)
            return out
        rope.apply_rotary_(x, cos, sin, ids, **options)
        return x

    fitting = fits(x, cos, sin, ids, **options)
    event(f"fits: {fitting}")
    if fitting:
        expected = rounded_once(x, cos, sin, ids, **options)
        assert_same_bits(rotate(), expected)
        if form == "in place":
            inputs, kept = inputs[1:], kept[1:]
    else:
        with pytest.raises(RuntimeError, match=r"^rope::apply_rotary\S*: expected .*, got "):
            rotate()
        assert out.eq(7).all()
    for now, before in zip(inputs, kept, strict=True):
        assert torch.equal(now, before)


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


@settings(max_examples=300)
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
