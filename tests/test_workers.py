"""Processes of data loaders: the operators work in them after use in the parent."""

import pytest
import torch
from support import assert_same_bits, random, random_table
from torch.utils.data import DataLoader, Dataset

import rope_ext

S, H, D, P = 300, 8, 64, 32  # PyTorch's threads are started for it
SECONDS = 60  # a worker that takes longer hangs
SAMPLES = 4


def rotated(index, backward):
    """A rotation, an in-place rotation and a table, from numbers that depend on index."""
    x = random(1, S, H, D, seed=index).requires_grad_(backward)
    cos, sin = (t.requires_grad_(backward) for t in random_table(S, P, seed=index))
    y = rope_ext.apply_rotary(x, cos, sin)
    grads = torch.autograd.grad(y, (x, cos, sin), y.detach()) if backward else ()
    with torch.no_grad():
        written = rope_ext.apply_rotary(x.detach().clone(), cos, sin, inplace=True)
    table = rope_ext.cos_sin_cache(rope_ext.frequencies.default(D)[0], S, start=index)
    return [y.detach(), *grads, written, *table]


class Rotated(Dataset):
    def __init__(self, backward):
        self.backward = backward

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return rotated(index, self.backward)


# Once PyTorch has started threads for any backward, none works in a fork of the process.
@pytest.mark.parametrize(
    ("method", "workers", "backward"), [("fork", 2, False), ("spawn", 1, True)]
)
def test_workers_get_the_bits_of_the_parent(method, workers, backward, threads):
    threads(4)
    expected = [rotated(index, backward) for index in range(SAMPLES)]  # this starts threads
    loader = DataLoader(
        Rotated(backward),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=method,
        timeout=SECONDS,
    )
    samples = list(loader)
    assert len(samples) == SAMPLES
    for got, want in zip(samples, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
    for a, b in zip(rotated(0, backward), expected[0], strict=True):  # the parent is unchanged too
        assert_same_bits(a, b)
