"""Views of one memory, with or without a common element: in place they are refused or written."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

rope = torch.ops.rope


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


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
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
