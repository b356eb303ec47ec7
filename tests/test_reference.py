"""The reference for the operators, checked by hand and by complex numbers."""

import torch
from support import random, random_table

from rope_ext import reference

B, S, H, P = 2, 3, 2, 4
D = 2 * P


def test_pairs_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 5)
    cos, sin = torch.tensor([[10.0, 20.0]]), torch.tensor([[0.5, 0.25]])
    half_split = [1 * 10 - 3 * 0.5, 2 * 20 - 4 * 0.25, 3 * 10 + 1 * 0.5, 4 * 20 + 2 * 0.25, 5]
    assert reference.apply_rotary(x, cos, sin).flatten().tolist() == half_split
    neighbours = [1 * 10 - 2 * 0.5, 2 * 10 + 1 * 0.5, 3 * 20 - 4 * 0.25, 4 * 20 + 3 * 0.25, 5]
    assert reference.apply_rotary(x, cos, sin, interleaved=True).flatten().tolist() == neighbours


def test_last_channels_and_another_order_by_hand():
    x = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 6)
    cos, sin = torch.tensor([[10.0, 20.0]]), torch.tensor([[0.5, 0.25]])
    pairs = (1 * 10 - 2 * 0.5, 2 * 10 + 1 * 0.5), (3 * 20 - 4 * 0.25, 4 * 20 + 3 * 0.25)
    options = {"rotary_offset": 1, "interleaved": True}
    y = reference.apply_rotary(x, cos, sin, **options)
    assert y.flatten().tolist() == [9, *pairs[0], *pairs[1], 5]
    y = reference.apply_rotary(x, cos, sin, **options, interleaved_out=False)
    assert y.flatten().tolist() == [9, pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], 5]
    x = x[..., [0, 1, 3, 2, 4, 5]]
    y = reference.apply_rotary(x, cos, sin, rotary_offset=1, interleaved_out=True)
    assert y.flatten().tolist() == [9, *pairs[0], *pairs[1], 5]


def test_columns_of_unequal_halves_are_in_the_order_of_the_result_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4)
    cos, sin = torch.tensor([[10.0, 20.0, 30.0, 40.0]]), torch.tensor([[0.5, 0.25, 0.125, 2.0]])
    orders = {"interleaved": True, "interleaved_out": False}  # pairs (1, 2) and (3, 4)
    y = reference.apply_rotary(x, cos, sin, rotary_dim=4, **orders)
    first = [1 * 10 - 2 * 0.5, 3 * 20 - 4 * 0.25]
    assert y.flatten().tolist() == [*first, 2 * 30 + 1 * 0.125, 4 * 40 + 3 * 2.0]
    # The inverse with the same table: the transposed matrix.
    dense = torch.cat([reference.apply_rotary(row.view(1, 1, 4), cos, sin, rotary_dim=4, **orders)
                       for row in torch.eye(4)]).view(4, 4)  # fmt: skip
    back = {"interleaved": False, "interleaved_out": True, "inverse": True}
    y = reference.apply_rotary(x, cos, sin, rotary_dim=4, **back)
    assert torch.equal(y.flatten(), dense @ x.flatten())


def test_unequal_halves_by_hand():
    x = torch.tensor([1.0, 2.0]).view(1, 1, 2)
    cos, sin = torch.tensor([[3.0, 5.0]]), torch.tensor([[7.0, 11.0]])
    y = reference.apply_rotary(x, cos, sin, rotary_dim=2)
    assert y.flatten().tolist() == [1 * 3 - 2 * 7, 2 * 5 + 1 * 11]
    y = reference.apply_rotary(x, cos, sin, rotary_dim=2, inverse=True)
    assert y.flatten().tolist() == [1 * 3 + 2 * 11, 2 * 5 - 1 * 7]  # the transposed matrix


def test_pairs_turn_as_complex_numbers_do():
    x = random(B, S, H, D, dtype=torch.float64)
    cos, sin = random_table(S, P, dtype=torch.float64)
    z = torch.view_as_complex(x.view(B, S, H, P, 2)) * torch.complex(cos, sin)[:, None, :]
    expected = torch.view_as_real(z).flatten(-2)
    torch.testing.assert_close(reference.apply_rotary(x, cos, sin, interleaved=True), expected)


def test_positions_pick_rows():
    x = random(B, S, H, D, dtype=torch.float64)
    cos, sin = random_table(9, P, dtype=torch.float64)
    ids = torch.tensor([[8, 0, 8], [1, 2, 3]])
    y = reference.apply_rotary(x, cos, sin, ids)
    for b in range(B):
        for s in range(S):
            row = slice(ids[b, s], ids[b, s] + 1)
            one = reference.apply_rotary(x[b : b + 1, s : s + 1], cos[row], sin[row])
            assert torch.equal(y[b, s], one[0, 0])


def test_cos_sin_is_the_cosine_and_sine_of_position_times_frequency():
    cos, sin = reference.cos_sin(torch.tensor([0.5, 2.0]), torch.tensor([3]), attention_scaling=2.0)
    expected = torch.tensor([[1.5, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(cos, 2 * expected.cos())
    torch.testing.assert_close(sin, 2 * expected.sin())
