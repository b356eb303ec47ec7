"""flash-attention's signatures on the operators, compared to its documented formula.
test_flash_attention.py has its own functions.
"""

from itertools import pairwise

import pytest
import torch
from support import (
    DTYPES,
    LargeTensors,
    assert_same_bits,
    name_of,
    random,
    random_table,
)

from rope_ext import reference
from rope_ext.integrations.reference_apis.flash_attention import (
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

B, S, H, KH, D, L = 3, 11, 4, 2, 16, 40

BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def formula_of_x(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets=0,
    cu_seqlens=None,
    max_seqlen=None,
):
    """flash-attention's documented formula, sequence by sequence, in the operators' arithmetic."""
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        ranges = [(b, slice(0, x.shape[1])) for b in range(x.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        ranges = [(None, slice(*pair)) for pair in pairwise(bounds)]
    out = x.clone()
    for b, tokens in ranges:
        which = tokens if b is None else (b, tokens)
        at = seqlen_offsets
        if isinstance(at, torch.Tensor):
            at = at[ranges.index((b, tokens))].item()
        rows = slice(at, at + tokens.stop - tokens.start)
        rotated = reference.apply_rotary(
            x[which].to(arithmetic),
            cos[rows].to(arithmetic),
            sin[rows].to(arithmetic),
            interleaved=interleaved,
        )
        out[which] = rotated.to(x.dtype)
    return out


DENSE, PACKED = (B, S, H, D), (3 * S, H, D)
CU_SEQLENS = torch.tensor([0, 5, 5, 26, 33], dtype=torch.int32)  # one empty, all of the 33 tokens

FLASH = {
    "from 0": (DENSE, {}),
    "from 9": (DENSE, {"seqlen_offsets": 9}),
    "up to the last row": (DENSE, {"seqlen_offsets": L - S}),
    "each from its own": (DENSE, {"seqlen_offsets": torch.tensor([0, 29, 7])}),
    "each, int32": (DENSE, {"seqlen_offsets": torch.tensor([3, 0, 12], dtype=torch.int32)}),
    "packed": (PACKED, {"cu_seqlens": CU_SEQLENS, "max_seqlen": 21}),
    "packed, int64": (PACKED, {"cu_seqlens": CU_SEQLENS.long(), "max_seqlen": 21}),
    "packed, no max_seqlen": (PACKED, {"cu_seqlens": CU_SEQLENS}),
    "packed from 19": (PACKED, {"cu_seqlens": CU_SEQLENS, "max_seqlen": 21, "seqlen_offsets": 19}),
    "packed, each from its own": (
        PACKED,
        {
            "cu_seqlens": CU_SEQLENS,
            "max_seqlen": 21,
            "seqlen_offsets": torch.tensor([35, 50, 0, 2]),  # 50 is past the table, of no token
        },
    ),
}


@BY_DTYPE
@PAIRS
@pytest.mark.parametrize("rotary_dim", [D, 6])
@pytest.mark.parametrize("case", FLASH)
def test_rotation(case, rotary_dim, interleaved, dtype):
    shape, options = FLASH[case]
    x = random(*shape, dtype=dtype)
    table = random_table(L, rotary_dim // 2, dtype=dtype)
    options = {"interleaved": interleaved, **options}
    expected = formula_of_x(x, *table, **options)
    assert_same_bits(apply_rotary_emb(x, *table, **options), expected)
    before = x.clone()
    written = apply_rotary_emb(x, *table, inplace=True, **options)
    assert written is x
    assert_same_bits(x, expected)
    if dtype == torch.float64:
        leaves = [t.clone().requires_grad_() for t in (before, *table)]
        weight = random(*shape, dtype=dtype, seed=1)
        got, expected = (
            torch.autograd.grad(function(*leaves, **options), leaves, weight)
            for function in (apply_rotary_emb, formula_of_x)
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("offsets", [4, torch.tensor([4, 9])], ids=["int", "tensor"])
def test_padding_after_the_last_sequence_takes_one_row(offsets):
    x, table = random(70, H, D), random_table(L, D // 2)
    cu_seqlens = torch.tensor([0, 3, 20])
    got = apply_rotary_emb(x, *table, cu_seqlens=cu_seqlens, max_seqlen=17, seqlen_offsets=offsets)
    row = 4 if isinstance(offsets, int) else 0
    rows = (t[row].expand(50, -1) for t in table)
    assert_same_bits(got[20:], reference.apply_rotary(x[20:], *rows))


QKV = {
    "q, k and v of as many heads": ((B, S, 3, H, D), {}),
    "from 9": ((B, S, 3, H, D), {"seqlen_offsets": 9}),
    "k has tables of its own": ((B, S, 3, H, D), {"cos_k": True, "sin_k": True}),
    "k has a sine of its own": ((B, S, 3, H, D), {"sin_k": True, "seqlen_offsets": 9}),
    "grouped, each from its own": (
        (B, S, H + 2 * KH, D),
        {"num_heads_q": H, "seqlen_offsets": torch.tensor([0, 29, 7])},
    ),
    "grouped, tables of k, each from its own": (
        (B, S, H + 2 * KH, D),
        {"num_heads_q": H, "cos_k": True, "sin_k": True, "seqlen_offsets": torch.tensor([2, 0, 9])},
    ),
    "no heads of k": ((B, S, H, D), {"num_heads_q": H}),
}


def qkv_formula(qkv, cos, sin, cos_k=None, sin_k=None, num_heads_q=None, **options):
    """q and k rotated separately, v unchanged."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
    else:
        of_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, of_k, of_k), 2)
    k_tables = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    parts = formula_of_x(q, cos, sin, **options), formula_of_x(k, *k_tables, **options), v
    return torch.stack(parts, 2) if qkv.dim() == 5 else torch.cat(parts, 2)


def kv_formula(kv, cos, sin, **options):
    return torch.stack((formula_of_x(kv[:, :, 0], cos, sin, **options), kv[:, :, 1]), 2)


def assert_rotates_in_place(rotate_, formula, packed, dtype):
    """Forward in the memory of `packed`; backward with one tensor of its size."""
    leaf = packed.clone().requires_grad_()
    x = leaf.clone()
    y = rotate_(x)
    assert y is x
    assert_same_bits(y.detach(), formula(packed))
    weight = random(*packed.shape, dtype=dtype, seed=4)
    kept = weight.clone()
    with LargeTensors(packed.numel()) as large:
        (gradient,) = torch.autograd.grad(y, leaf, weight, retain_graph=True)
    assert large.made_by == ["aten.clone.default"]
    assert_same_bits(weight, kept)
    (of_a_sum,) = torch.autograd.grad(y.sum(), leaf)  # its gradient has stride 0
    for got, outer in ((gradient, weight), (of_a_sum, torch.ones_like(weight))):
        (expected,) = torch.autograd.grad(formula(leaf), leaf, outer)
        if dtype in (torch.float64, torch.float32):
            assert_same_bits(got, expected)
        else:  # the formula's is a sum of two that are rounded
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got, expected, rtol=2 * eps, atol=8 * eps)


@BY_DTYPE
@PAIRS
@pytest.mark.parametrize("case", QKV)
def test_qkv_is_rotated_in_place(case, interleaved, dtype):
    shape, options = QKV[case]
    table = random_table(L, D // 2 - 1, dtype=dtype)
    of_k = dict(
        zip(("cos_k", "sin_k"), random_table(L, D // 2 - 1, dtype=dtype, seed=5), strict=True)
    )
    options = {name: of_k[name] if x is True else x for name, x in options.items()}
    options["interleaved"] = interleaved
    assert_rotates_in_place(
        lambda x: apply_rotary_emb_qkv_(x, *table, **options),
        lambda x: qkv_formula(x, *table, **options),
        random(*shape, dtype=dtype),
        dtype,
    )


@BY_DTYPE
@pytest.mark.parametrize("offsets", [0, 9, torch.tensor([0, 29, 7])], ids=["0", "9", "each"])
def test_kv_is_rotated_in_place(offsets, dtype):
    table = random_table(L, D // 2 - 1, dtype=dtype)
    options = {"interleaved": True, "seqlen_offsets": offsets}
    assert_rotates_in_place(
        lambda x: apply_rotary_emb_kv_(x, *table, **options),
        lambda x: kv_formula(x, *table, **options),
        random(B, S, 2, H, D, dtype=dtype),
        dtype,
    )


def test_in_place_is_twice_differentiable_on_views_too():
    table, of_k = random_table(L, 2, dtype=torch.float64), random_table(L, 2, dtype=torch.float64)
    leaf = random(2, 3, 4, 2 * 4, dtype=torch.float64).requires_grad_()

    def rotated(leaf):
        qkv = (leaf * 1).unflatten(-1, (2, 4))[:, :, :3]  # a view, not dense
        y = apply_rotary_emb_qkv_(qkv, *table, *of_k)
        return apply_rotary_emb_kv_(y[:, :, 1:], *table)

    torch.autograd.gradcheck(rotated, leaf)
    torch.autograd.gradgradcheck(rotated, leaf)


@pytest.mark.parametrize(
    ("leaf", "learned", "offset", "message"),
    [
        (True, False, 0, "qkv_: expected qkv to be no leaf that requires grad"),
        (False, True, 0, "qkv_: expected cos and sin to need no gradient"),
        (False, False, L - S + 1, r"position_ids in \[0, 40\).*got 40"),
    ],
    ids=["a leaf", "learned tables", "a position past the table"],
)
def test_in_place_refuses_before_it_writes(leaf, learned, offset, message):
    qkv, table = random(1, S, 3, H, D).requires_grad_(leaf), random_table(L, D // 2)
    before = qkv.detach().clone()
    table = [t.requires_grad_(learned) for t in table]
    with pytest.raises(RuntimeError, match=message):
        apply_rotary_emb_qkv_(qkv, *table, *table, seqlen_offsets=torch.tensor([offset]))
    assert_same_bits(qkv.detach(), before)


def test_without_a_sequence():
    x, table = random(0, H, D), random_table(L, D // 2)
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    assert apply_rotary_emb(x, *table, cu_seqlens=cu_seqlens).shape == x.shape
