"""Several Python threads call the operators at once: each gets the same bits as alone. And a thread
changes the indices of a call during the call.

ROPE_EXT_STRESS_SECONDS is their duration, by default 2 seconds; .ci/run sets 30.
"""

import os
import random as python_random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from support import assert_same_bits, random, random_positions, random_table

import rope_ext

rope = torch.ops.rope

THREADS = 8
SECONDS = float(os.environ.get("ROPE_EXT_STRESS_SECONDS", "2"))
B, S, H, K, D, P, L = 2, 150, 4, 2, 64, 32, 200  # more than one thread of PyTorch's works on it


def in_threads(work):
    """Runs work(number of the thread) in each thread at the same time; returns the results."""
    start = Barrier(THREADS)

    def begin(thread):
        start.wait(60)
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def calls():
    """Calls of every operator on inputs that all threads share, by name. Each returns tensors."""
    q, k = random(B, S, H, D), random(B, S, K, D)
    cos, sin = random_table(L, P)
    ids = random_positions(B, S, rows=L)
    inv_freq, _ = rope_ext.frequencies.default(D)
    rotary = rope_ext.RotaryEmbedding(D, max_position_embeddings=L)

    def rotated_by(**options):
        return lambda: (rope_ext.apply_rotary(q, cos, sin, ids, **options),)

    def together(dtype):
        half_q, half_k = q.to(dtype), k.to(dtype)
        return lambda: rope_ext.apply_rotary_qk(half_q, half_k, cos, sin, ids)

    def in_place():
        own_q, own_k = q.clone(), k.clone()
        return rope_ext.apply_rotary_qk(own_q, own_k, cos, sin, ids, inplace=True)

    def into_out():
        return (rope_ext.apply_rotary(q, cos, sin, out=torch.empty_like(q)),)

    def backward():
        leaves = [t.clone().requires_grad_() for t in (q, k, cos, sin)]
        out = rope_ext.apply_rotary_qk(*leaves, ids)
        return torch.autograd.grad(out, leaves, (k.repeat(1, 1, 2, 1), k))

    def backward_in_place():
        x = q.clone().requires_grad_()
        y = rope_ext.apply_rotary(x * 1, cos, sin, ids, inplace=True)
        return torch.autograd.grad(y, x, q)

    def backward_to_frequencies():
        leaf = inv_freq.clone().requires_grad_()
        return torch.autograd.grad(rope_ext.cos_sin(leaf, ids), leaf, (cos[ids], sin[ids]))

    return {
        "half-split": rotated_by(),
        "interleaved, inverse": rotated_by(interleaved=True, inverse=True),
        "float16": together(torch.float16),
        "bfloat16": together(torch.bfloat16),
        "float64": together(torch.float64),
        "in place": in_place,
        "out": into_out,
        "backward": backward,
        "backward in place": backward_in_place,
        "cos_sin": lambda: rope_ext.cos_sin(inv_freq, ids),
        "by angles": lambda: rope_ext.apply_rotary_qk_at(q, k, inv_freq, ids),
        "cos_sin_cache": lambda: rope_ext.cos_sin_cache(inv_freq, 300, start=7),
        "backward to frequencies": backward_to_frequencies,
        "module": lambda: rotary(q, k),
    }


def test_eight_threads_get_the_bits_of_one(threads):
    every = calls()
    threads(1)
    expected = {name: call() for name, call in every.items()}
    threads(3)
    deadline = time.monotonic() + SECONDS

    def work(thread):
        names = list(every)
        shuffle = python_random.Random(thread).shuffle
        rounds = 0
        while rounds == 0 or time.monotonic() < deadline:
            shuffle(names)
            for name in names:
                for got, want in zip(every[name](), expected[name], strict=True):
                    assert_same_bits(got, want, f"thread {thread}, {name}")
            rounds += 1
        return rounds

    assert min(in_threads(work)) > 0


def test_table_that_threads_grow_together_has_its_rows():
    """The table of one module, for different lengths: a thread never gets too few or wrong rows."""
    deadline = time.monotonic() + SECONDS / 4
    inv_freq, _ = rope_ext.frequencies.default(D)
    whole = rope_ext.cos_sin_cache(inv_freq, 500)
    modules = 0
    while modules < 5 or time.monotonic() < deadline:
        rotary = rope_ext.RotaryEmbedding(D, max_position_embeddings=4)

        def work(thread, rotary=rotary):
            for length in range(1 + thread, 200, 23 + thread):
                for got, want in zip(rotary.table(length), whole, strict=True):
                    assert got.shape[0] >= length
                    assert_same_bits(got, want[: got.shape[0]])

        in_threads(work)
        modules += 1


def test_indices_that_change_during_a_call_give_nan_or_an_error():
    """And never a crash: in a separate process, as a crash would end pytest."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("changing_indices.py"), str(SECONDS / 2)],
        env={**os.environ, "PYTHONPATH": str(Path(rope_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"status {result.returncode}\n{result.stdout}{result.stderr}"
