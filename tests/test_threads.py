"""Several Python threads call the operators at once: each gets the same bits as alone. And a thread
changes the indices of a call during the call.

ROPE_EXT_STRESS_SECONDS is their duration, by default 2 seconds; .ci/run sets 10.
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
from operator_arguments import Sizes, arguments_of, results_of, tensors_of
from support import assert_same_bits

import rope_ext
from rope_ext._operators import OPERATORS

THREADS = 8
SECONDS = float(os.environ.get("ROPE_EXT_STRESS_SECONDS", "2"))
SIZES = Sizes(B=2, S=150, H=4, K=2, D=64, L=200)  # for more than one of PyTorch's threads
CASES = ((torch.float32, False), (torch.bfloat16, True))  # dtype, and whether options are given


def in_threads(work):
    """Runs work(number of the thread) in each thread at the same time; returns the results."""
    start = Barrier(THREADS)

    def begin(thread):
        start.wait(60)
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def calls():
    """Calls of every operator on inputs that all threads share, of derivatives, and of a module, by
    name. Each returns tensors. What is written is a copy for each call.
    """
    every = {}
    for dtype, optional in CASES:
        for operator in OPERATORS:
            given = arguments_of(operator, SIZES, dtype=dtype, optional=optional)

            def of_operator(operator=operator, given=given):
                own = {name: given[name].clone() for name in operator.written if name in given}
                return results_of(operator.overload, given | own, operator.written)

            every[f"{operator.name}, {dtype}"] = of_operator

    given = tensors_of(SIZES)
    rotary = rope_ext.RotaryEmbedding(SIZES.D, max_position_embeddings=SIZES.L)

    def backward(names, function, *results):
        leaves = [given[name].clone().requires_grad_() for name in names]
        return torch.autograd.grad(function(*leaves), leaves, [given[name] for name in results])

    def in_place(x):
        return rope_ext.apply_rotary(x * 1, given["cos"], given["sin"], inplace=True)

    return every | {
        "backward": lambda: backward(
            ("q", "k", "cos", "sin"), rope_ext.apply_rotary_qk, "grad_q", "grad_k"
        ),
        "backward in place": lambda: backward(("x",), in_place, "grad_q"),
        "backward to frequencies": lambda: backward(
            ("inv_freq",),
            lambda f: rope_ext.cos_sin(f, given["position_ids"]),
            "grad_cos",
            "grad_sin",
        ),
        "module": lambda: rotary(given["q"], given["k"]),
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
    inv_freq, _ = rope_ext.frequencies.default(SIZES.D)
    whole = rope_ext.cos_sin_cache(inv_freq, 500)
    modules = 0
    while modules < 5 or time.monotonic() < deadline:
        rotary = rope_ext.RotaryEmbedding(SIZES.D, max_position_embeddings=4)

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
