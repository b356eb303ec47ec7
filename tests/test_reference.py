"""The reference that judges the operators, judged itself: by hand and by complex numbers."""

import torch
from support import random, random_table

from rope_ext import reference

B, S, H, P = 2, 3, 2, 4
D = 2 * P


def test_half_split_pairs_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 5)
    cos, sin = torch.tensor([[10.0, 20.0]]), torch.tensor([[0.5, 0.25]])
    expected = [1 * 10 - 3 * 0.5, 2 * 20 - 4 * 0.25, 3 * 10 + 1 * 0.5, 4 * 20 + 2 * 0.25, 5]
    assert reference.apply_rotary(x, cos, sin).flatten().tolist() == expected


def test_interleaved_pairs_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 5)
    cos, sin = torch.tensor([[10.0, 20.0]]), torch.tensor([[0.5, 0.25]])
    expected = [1 * 10 - 2 * 0.5, 2 * 10 + 1 * 0.5, 3 * 20 - 4 * 0.25, 4 * 20 + 3 * 0.25, 5]
    assert reference.apply_rotary(x, cos, sin, interleaved=True).flatten().tolist() == expected


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
