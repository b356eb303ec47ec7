"""Any strides: packed tensors, gaps, expanded and misaligned data; any number of threads."""

import pytest
import torch
from support import (
    DTYPES,
    ORDERS,
    VIEWS,
    assert_same_bits,
    name_of,
    random,
    random_positions,
    random_table,
    rounded_once,
)

rope = torch.ops.rope

B, S, H, D, P = 2, 5, 3, 40, 20
L = 9


def base_on(device, dtype, seed=0):
    return lambda *shape: random(*shape, dtype=dtype, device=device, seed=seed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("view", VIEWS)
def test_view_is_rotated_as_its_copy_is(view, dtype, order, backend):
    x = VIEWS[view](base_on(backend, dtype), B, S, H, D)
    cos, sin = random_table(L, P, device=backend)
    ids = random_positions(B, S, rows=L, device=backend)
    y = rope.apply_rotary(x, cos, sin, ids, **ORDERS[order])
    assert_same_bits(y, rounded_once(x, cos, sin, ids, **ORDERS[order]))


@pytest.mark.parametrize("view", VIEWS)
def test_output_has_the_strides_of_empty_like(view, device):
    x = VIEWS[view](base_on(device, torch.float32), B, S, H, D)
    cos, sin = random_table(S, P, device=device)
    assert rope.apply_rotary(x, cos, sin).stride() == torch.empty_like(x).stride()
    q, k = rope.apply_rotary_qk(x, x[:, :, :1], cos, sin)
    assert q.stride() == torch.empty_like(x).stride()
    assert k.stride() == torch.empty_like(x[:, :, :1]).stride()


@pytest.mark.parametrize("view", VIEWS)
def test_q_and_k_may_have_different_strides(view, device):
    q = random(B, S, 4, D, device=device)
    k = VIEWS[view](base_on(device, torch.float32, seed=5), B, S, H, D)
    cos, sin = random_table(S, P, device=device)
    out_q, out_k = rope.apply_rotary_qk(q, k, cos, sin)
    assert_same_bits(out_q, rounded_once(q, cos, sin))
    assert_same_bits(out_k, rounded_once(k, cos, sin))


@pytest.mark.parametrize("expanded", ["batch", "sequence", "heads", "all"])
def test_expanded_input_gives_a_dense_output(expanded, backend):
    shape = [B, S, H, D]
    for dim in {"batch": [0], "sequence": [1], "heads": [2], "all": [0, 1, 2]}[expanded]:
        shape[dim] = 1
    x = random(*shape, device=backend).expand(B, S, H, D)
    cos, sin = random_table(S, P, device=backend)
    y = rope.apply_rotary(x, cos, sin)
    assert_same_bits(y, rounded_once(x, cos, sin))
    assert y.is_contiguous() or sorted(y.stride()) == sorted(torch.empty(y.shape).stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 8])
def test_misaligned_data_are_rotated_alike(offset, dtype, backend):
    """Wide loads must not need an alignment of 16 bytes: of x, out, cos and sin."""
    D, P = 64, 32
    x = random(offset + B * S * H * D, dtype=dtype, device=backend)[offset:].view(B, S, H, D)
    angles = random(offset + 2 * S * P, dtype=dtype, device=backend)[offset:].view(2, S, P)
    cos, sin = angles.unbind()
    expected = rounded_once(x, cos, sin)
    assert_same_bits(rope.apply_rotary(x, cos, sin), expected)
    rope.apply_rotary_(x, cos, sin)
    assert_same_bits(x, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", [1, 2, 4, 5, 8])
def test_rotation_from_a_misaligned_channel_on_is_the_same(offset, dtype, order, backend):
    """Heads are aligned to 16 bytes or more; the first rotated channel need not be."""
    D, P = 80, 32
    x = random(B, S, H, D, dtype=dtype, device=backend)
    cos, sin = random_table(S, P, device=backend)
    options = {"rotary_offset": offset, **ORDERS[order]}
    expected = rounded_once(x, cos, sin, **options)
    assert_same_bits(rope.apply_rotary(x, cos, sin, **options), expected)
    if "interleaved_out" not in options:
        rope.apply_rotary_(x, cos, sin, **options)
        assert_same_bits(x, expected)


TABLES = {
    "cos beside sin": lambda base: (base(L, 2 * P)[:, :P], base(L, 2 * P)[:, P:]),
    "columns of a wider table": lambda base: (base(L, P + 3)[:, 1 : P + 1], base(L, P)),
    "every second row": lambda base: (base(2 * L, P)[::2], base(2 * L, P)[1::2]),
    "one row for all": lambda base: (base(1, P).expand(L, P), base(1, P).expand(L, P)),
    "rows run backwards in memory": lambda base: (base(L, 2, P)[:, 1], base(L, 2, P)[:, 0]),
}


@pytest.mark.parametrize("table", TABLES)
def test_table_may_be_a_view(table, backend):
    cos, sin = TABLES[table](base_on(backend, torch.float32))
    x = random(B, S, H, D, device=backend)
    ids = random_positions(B, S, rows=L, device=backend)
    for options in ({}, {"position_ids": ids}):
        assert_same_bits(
            rope.apply_rotary(x, cos, sin, **options), rounded_once(x, cos, sin, **options)
        )


ROWS = {
    "batch and sequence swapped": lambda base: base(S, B, P).transpose(0, 1),
    "one batch for all": lambda base: base(1, S, P).expand(B, S, P),
    "one row for all tokens": lambda base: base(1, 1, P).expand(B, S, P),
    "cos beside sin": lambda base: base(B, S, 2 * P)[..., :P],
}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_may_be_views(rows, backend):
    cos = ROWS[rows](base_on(backend, torch.float32, seed=1))
    sin = ROWS[rows](base_on(backend, torch.float32, seed=2))
    x = random(B, S, H, D, device=backend)
    assert_same_bits(rope.apply_rotary(x, cos, sin), rounded_once(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("ids", ["transposed", "every second", "expanded S", "expanded B", "one"])
def test_position_ids_may_be_views(ids, dtype, backend):
    def make(*shape):
        return random_positions(*shape, rows=L, dtype=dtype, device=backend)

    view = {
        "transposed": lambda: make(S, B).t(),
        "every second": lambda: make(2 * B, 2 * S)[::2, 1::2],
        "expanded S": lambda: make(B, 1).expand(B, S),
        "expanded B": lambda: make(1, S).expand(B, S),
        "one": lambda: make(1).expand(S),
    }[ids]()
    x = random(B, S, H, D, device=backend)
    cos, sin = random_table(L, P, device=backend)
    assert_same_bits(rope.apply_rotary(x, cos, sin, view), rounded_once(x, cos, sin, view))


def test_offsets_past_32_bits(cpu_kernels):
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


SIZES = [  # B, S, H of q, H of k
    (1, 1, 32, 8),  # decode, one sequence
    (64, 1, 3, 1),  # decode, many sequences
    (1, 1, 1031, 257),  # more heads than tokens: threads share the heads
    (1, 700, 3, 1),  # more tokens than a thread takes at once
    (3, 211, 2, 2),  # a thread's share ends within a sequence
    (130, 3, 1, 1),  # short sequences: a share has several
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_that_are_shared_out_differently(size, backend):
    B, S, H, K = size
    q = random(B, S, H, D, dtype=torch.bfloat16, device=backend)
    k = random(B, S, K, D, dtype=torch.bfloat16, device=backend)
    cos, sin = random_table(S + 2, P, device=backend)
    ids = random_positions(B, S, rows=S + 2, device=backend)
    out_q, out_k = rope.apply_rotary_qk(q, k, cos, sin, ids)
    assert_same_bits(out_q, rounded_once(q, cos, sin, ids))
    assert_same_bits(out_k, rounded_once(k, cos, sin, ids))
    rope.apply_rotary_qk_(q, k, cos, sin, ids)
    assert_same_bits(q, out_q)
    assert_same_bits(k, out_k)


@pytest.mark.parametrize("size", [(2, 800, 8, 2), (1, 1, 900, 900), (40, 20, 4, 1)], ids=str)
def test_number_of_threads_does_not_change_a_bit(size, threads):
    B, S, H, K = size
    q, k = random(B, S, H, 64), random(B, S, K, 64)
    cos, sin = random_table(S, 32)
    threads(1)
    one = rope.apply_rotary_qk(q, k, cos, sin)
    threads(2)
    two = rope.apply_rotary_qk(q, k, cos, sin)
    threads(5)
    five = rope.apply_rotary_qk(q, k, cos, sin)
    for a, b, c in zip(one, two, five, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)
    assert_same_bits(one[0], rounded_once(q, cos, sin))
