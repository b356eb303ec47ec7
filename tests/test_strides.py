"""Any strides of what is read and written: packed tensors, gaps, expanded and misaligned data; any
number of threads.
"""

import os

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    VIEWS,
    assert_same_bits,
    guarded,
    name_of,
    pairwise,
    random,
    random_positions,
    random_table,
    rounded_once,
)

rope = torch.ops.rope

B, S, H, D, P = 2, 5, 3, 48, 20  # eight channels stay
L = 9


def base_on(device, dtype=torch.float32, seed=0):
    return lambda *shape: random(*shape, dtype=dtype, device=device, seed=seed)


def view_in_memory(view, dtype, device):
    """A view [B, S, H, D], and all of the memory around it."""
    memory = []

    def base(*shape):
        dense, whole = guarded(*shape, dtype=dtype, device=device)
        memory.append(whole)
        return dense

    return view(base, B, S, H, D), memory[0]


def with_values(memory, view, values):
    """A copy of the memory with these values in the view."""
    copy = memory.cpu().clone()
    copy.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(values)
    return copy


@pytest.mark.parametrize(
    ("view", "dtype", "order", "rotary_offset"),
    pairwise(view=VIEWS, dtype=DTYPES, order=ORDERS, rotary_offset=(0, 3, 8)),
)
def test_view_is_rotated_as_its_copy_is_and_nothing_beside_it_written(
    view, dtype, order, rotary_offset, device
):
    x, memory = view_in_memory(view, dtype, device)
    out, memory_of_out = view_in_memory(view, dtype, device)
    cos, sin = random_table(L, P, device=device)
    ids = random_positions(B, S, rows=L, device=device)
    options = {"rotary_offset": rotary_offset, **order}
    before, expected = memory.clone(), rounded_once(x, cos, sin, ids, **options)
    written = with_values(memory, x, expected)

    y = rope.apply_rotary(x, cos, sin, ids, **options)
    assert_same_bits(y, expected, "out of place")
    assert y.stride() == torch.empty_like(x).stride()

    assert rope.apply_rotary.out(x, cos, sin, ids, **options, out=out) is None
    assert_same_bits(memory_of_out, written, "into out")
    assert_same_bits(memory, before, "read")

    if "interleaved_out" not in options:
        assert rope.apply_rotary_(x, cos, sin, ids, **options) is None
        assert_same_bits(memory, written, "in place")


def test_q_and_k_may_have_different_strides(device):
    q, cos_sin = random(B, S, 4, D, device=device), random_table(S, P, device=device)
    for view in VIEWS:
        k = VIEWS[view](base_on(device, seed=5), B, S, H, D)
        for got, x in zip(rope.apply_rotary_qk(q, k, *cos_sin), (q, k), strict=True):
            assert_same_bits(got, rounded_once(x, *cos_sin), view)
            assert got.stride() == torch.empty_like(x).stride(), view


def test_expanded_input_gives_a_dense_output(device):
    cos_sin = random_table(S, P, device=device)
    for shape in ((1, S, H, D), (B, 1, H, D), (B, S, 1, D), (1, 1, 1, D)):
        x = random(*shape, device=device).expand(B, S, H, D)
        y = rope.apply_rotary(x, *cos_sin)
        assert_same_bits(y, rounded_once(x, *cos_sin), shape)
        assert sorted(y.stride()) == sorted(torch.empty(y.shape).stride()), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_data_are_rotated_alike(offset, dtype, device):
    """Wide loads must not need an alignment of 16 bytes: of x, out, cos and sin."""
    D, P = 64, 32
    x = random(offset + B * S * H * D, dtype=dtype, device=device)[offset:].view(B, S, H, D)
    angles = random(offset + 2 * S * P, dtype=dtype, device=device)[offset:].view(2, S, P)
    cos, sin = angles.unbind()
    expected = rounded_once(x, cos, sin)
    assert_same_bits(rope.apply_rotary(x, cos, sin), expected)
    rope.apply_rotary_(x, cos, sin)
    assert_same_bits(x, expected)


# x [2, S, H, D], cos and sin [S, P]: everything allows the widest vectors but what is named.
UNALIGNED = {
    "stride of the sequences": lambda base: (
        base(2, S * H * D + 1)[:, :-1].unflatten(1, (S, H, D)),
        *base(2, S, 16),
    ),
    "rows of cos": lambda base: (base(2, S, H, 64), base(S, 17)[:, :16], base(S, 16)),
    "rows of sin": lambda base: (base(2, S, H, 64), base(S, 16), base(S, 17)[:, :16]),
    "channels that stay": lambda base: (base(2, S, H, 64)[..., :33], *base(2, S, 16)),
}


@pytest.mark.parametrize("unaligned", UNALIGNED)
def test_vectors_are_no_wider_than_every_stride_allows(unaligned, device):
    for dtype in DTYPES:
        x, cos, sin = UNALIGNED[unaligned](base_on(device, dtype))
        out = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)
        rope.apply_rotary.out(x, cos, sin, out=out)
        assert_same_bits(out, rounded_once(x, cos, sin), dtype)


@pytest.mark.parametrize(
    ("offset", "dtype", "order"), pairwise(offset=(1, 2, 4, 5, 8), dtype=DTYPES, order=ORDERS)
)
def test_rotation_from_a_misaligned_channel_on_is_the_same(offset, dtype, order, device):
    """Heads are aligned to 16 bytes or more; the first rotated channel need not be."""
    D, P = 80, 32
    x = random(B, S, H, D, dtype=dtype, device=device)
    cos, sin = random_table(S, P, device=device)
    options = {"rotary_offset": offset, **order}
    expected = rounded_once(x, cos, sin, **options)
    assert_same_bits(rope.apply_rotary(x, cos, sin, **options), expected)
    if "interleaved_out" not in options:
        rope.apply_rotary_(x, cos, sin, **options)
        assert_same_bits(x, expected)


TABLES = {
    "cos beside sin": lambda base: base(L, 2 * P).chunk(2, -1),
    "columns of a wider table": lambda base: (base(L, P + 3)[:, 1 : P + 1], base(L, P)),
    "every second row": lambda base: base(L, 2, P).unbind(1),
    "one row for all": lambda base: base(2, 1, P).expand(2, L, P),
}
ROWS = {
    "batch and sequence swapped": lambda base: base(2, S, B, P).transpose(1, 2),
    "those of one sequence": lambda base: base(2, 1, S, P),
    "one batch for all": lambda base: base(2, 1, S, P).expand(2, B, S, P),
    "one row for all tokens": lambda base: base(2, 1, 1, P).expand(2, B, S, P),
    "cos beside sin for each token": lambda base: base(B, S, 2 * P).chunk(2, -1),
}


@pytest.mark.parametrize("view", [*TABLES, *ROWS])
def test_table_and_rows_may_be_views(view, device):
    cos, sin = {**TABLES, **ROWS}[view](base_on(device))
    x = random(B, S, H, D, device=device)
    assert_same_bits(rope.apply_rotary(x, cos, sin), rounded_once(x, cos, sin))
    if view in TABLES:
        ids = random_positions(B, S, rows=L, device=device)
        assert_same_bits(rope.apply_rotary(x, cos, sin, ids), rounded_once(x, cos, sin, ids))


IDS = {
    "transposed": lambda base: base(S, B).t(),
    "every second": lambda base: base(2 * B, 2 * S)[::2, 1::2],
    "expanded S": lambda base: base(B, 1).expand(B, S),
    "expanded B": lambda base: base(1, S).expand(B, S),
    "one": lambda base: base(1).expand(S),
}


@pytest.mark.parametrize("view", IDS)
def test_position_ids_may_be_views(view, device):
    x, cos_sin = random(B, S, H, D, device=device), random_table(L, P, device=device)
    for dtype in (torch.int32, torch.int64):
        ids = IDS[view](lambda *shape: random_positions(*shape, rows=L, device=device).to(dtype))  # noqa: B023
        assert_same_bits(rope.apply_rotary(x, *cos_sin, ids), rounded_once(x, *cos_sin, ids), dtype)


def test_offsets_past_32_bits():
    """Two tokens 2^31 elements apart, and two rows of the table."""
    far = 2**31 + 100
    memory = torch.empty(far + 4096, dtype=torch.bfloat16)  # unwritten pages take no memory
    x = memory.as_strided((1, 2, H, D), (0, far, D, 1), 5)
    angles = torch.empty(far + 4096, dtype=torch.bfloat16)
    cos, sin = (angles.as_strided((2, P), (far, 1), offset) for offset in (0, 1000))
    for t in (x, cos, sin):
        t.copy_(random(*t.shape))
    expected = rounded_once(x, cos, sin)
    assert_same_bits(rope.apply_rotary(x, cos, sin), expected)
    rope.apply_rotary_(x, cos, sin)
    assert_same_bits(x, expected)


@pytest.mark.slow  # copies 4 GiB
def test_more_than_2_31_elements_in_place_and_in_the_gradient_to_the_table():
    """x [1, S, H, D]: zeros except in some tokens, those around powers of two among them."""
    H, D = 512, 256
    S = 2**31 // (H * D) + 3
    tokens = [0, 1, S // 2 - 1, S // 2, S - 5, S - 4, S - 3, S - 2, S - 1]  # 2^31 is in S - 3
    needed = 1.25 * 2 * S * H * D
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free memory")
    x = torch.zeros(1, S, H, D, dtype=torch.bfloat16)
    x[:, tokens] = few = random(1, len(tokens), H, D, dtype=torch.bfloat16)
    cos, sin = random_table(S, D)
    rows = cos[tokens], sin[tokens]
    options = {"rotary_dim": D}  # an angle a channel, so that no gradient is 0 where grad is x
    backward = rope.apply_rotary_table_backward
    grads = backward(x, x, None, None, cos, **options)
    for grad, want in zip(grads, backward(few, few, None, None, rows[0], **options), strict=True):
        assert_same_bits(grad[tokens], want)
        assert grad.count_nonzero() == want.count_nonzero() == want.numel()
    rope.apply_rotary_(x, cos, sin, **options)
    assert_same_bits(x[:, tokens], rounded_once(few, *rows, **options))


SIZES = [  # B, S, H of q, H of k
    (1, 1, 32, 8),  # decode, one sequence
    (64, 1, 3, 1),  # decode, many sequences
    (1, 1, 1031, 257),  # more heads than tokens: threads share the heads
    (1, 1103, 3, 1),  # blocks of two tokens, the last of one: 132 multiprocessors, 4 blocks each
    (3, 371, 2, 2),  # the last block of each sequence is not full
    (130, 3, 1, 1),  # short sequences: a share has several
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_that_are_shared_out_differently(size, device, threads):
    B, S, H, K = size
    q, k = (random(B, S, heads, D, dtype=torch.bfloat16, device=device) for heads in (H, K))
    cos, sin = random_table(S + 2, P, device=device)
    ids = random_positions(B, S, rows=S + 2, device=device)
    expected = [rounded_once(x, cos, sin, ids) for x in (q, k)]
    for count in (1, 2, 5) if device.type == "cpu" else (1,):
        threads(count)
        for got, want in zip(rope.apply_rotary_qk(q, k, cos, sin, ids), expected, strict=True):
            assert_same_bits(got, want, f"{count} threads")
    rope.apply_rotary_qk_(q, k, cos, sin, ids)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])
