"""The operators launch on the current stream, never wait, and allocate only their outputs.

Capture in a CUDA graph requires that. A small library, loaded before the CUDA runtime, counts the
calls that a process makes to the runtime: this file, as a program, makes them.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import rope_ext
from rope_ext import _C
from rope_ext._operators import OPERATORS

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


def calls():
    """name -> number of outputs and workspaces allocated, of kernels launched, and arguments."""
    cuda = torch.device("cuda")
    inv_freq = rope_ext.frequencies.default(64)[0].to(cuda)
    table = [t.to(cuda) for t in rope_ext.cos_sin_cache(inv_freq.cpu(), 16)]
    q, k, v = (torch.randn(2, 16, heads, 64).to(cuda) for heads in (4, 2, 2))
    ids, slots = torch.arange(16).to(cuda), torch.arange(32).to(cuda)
    later = torch.arange(9, 41).to(cuda)
    caches = torch.zeros(2, 2, 16, 2, 64).to(cuda)
    latent, compressed = torch.zeros(2, 16, 40 + 64).to(cuda), torch.randn(2, 16, 40).to(cuda)
    by_axis = torch.arange(48).view(3, 16).to(cuda), (torch.arange(32) % 3).to(cuda)
    return {
        "apply_rotary": (1, 1, q, *table),
        "apply_rotary_qk": (2, 1, q, k, *table),
        "apply_rotary_": (0, 1, q, *table),
        "apply_rotary_qk_": (0, 1, q, k, *table),
        "apply_rotary_qk_ with position_ids": (0, 1, q, k, *table, ids),
        "apply_rotary_qk_append_kv_": (0, 1, q, k, v, *caches, slots, *table),
        "apply_rotary_mla_append_": (0, 1, q, k[:, :, :1], compressed, latent, slots, *table),
        "shift_cached_k_": (0, 1, caches[0], slots, slots, later, inv_freq),
        "apply_rotary_table_backward": (2, 1, q, q, k, k, table[0]),
        "cos_sin_cache": (2, 1, inv_freq, 16),
        "cos_sin": (2, 1, inv_freq, ids),
        "cos_sin_backward": (2, 2, *table, inv_freq),  # partial sums, then their sum
        "cos_sin with axes": (2, 1, inv_freq, *by_axis),
        "apply_rotary_qk_at": (2, 1, q, k, inv_freq),
        "apply_rotary_qk_at_ with axes": (0, 1, q, k, inv_freq, *by_axis),
    }


def ways(name, arguments):
    """The operator by the dispatcher, and as the functions of rope_ext call it."""
    record = next(operator for operator in OPERATORS if operator.name == name.split()[0])
    every = record.given(tuple(arguments), {}).values()
    direct = partial(_C.direct_calls[record.name], "bshd", "NHD", None, *every)
    return {name: partial(record.overload, *arguments), f"{name} directly": direct}


def count(library):
    """Makes each call, and prints what the library has counted."""
    counter = ctypes.CDLL(library)
    counter.calls_last_stream.restype = ctypes.c_void_p
    stream = torch.cuda.Stream()
    found = {}
    for called, (allocations, launches, *arguments) in calls().items():
        for name, call in ways(called, arguments).items():
            call()  # what is set up once is set up now
            with torch.cuda.stream(stream):
                counter.calls_reset()
                kept = call()
                found[name] = {
                    "taken": (kept is not NotImplemented, True),
                    "on the current stream": (
                        counter.calls_last_stream() == stream.cuda_stream,
                        True,
                    ),
                    "launches": (counter.calls_launches(), launches),
                    "allocations": (counter.calls_allocations(), allocations),
                    "synchronisations": (counter.calls_synchronisations(), 0),
                }
            counter.calls_report_error(LAUNCH_FAILURE)
            try:
                call()
            except RuntimeError as error:
                found[name]["failed launch"] = str(error)
            counter.calls_report_error(0)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if rope_ext._C.build_info()["cudart"] != "shared":
        pytest.skip("the CUDA runtime is linked statically: its calls can't be seen")
    library = tmp_path_factory.mktemp("calls") / "calls.so"
    source = str(TESTS / "cuda_calls.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    preload = f"{library}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    # without the caching allocator every allocation is a call
    environment = {"LD_PRELOAD": preload, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = str(Path(rope_ext.__file__).parents[1])
    done = subprocess.run([sys.executable, __file__, str(library)], check=False, text=True,
                          env={**os.environ, **environment}, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.cuda
def test_operators_can_be_captured_and_their_failed_launches_raise(found):
    assert len(found) == 2 * 15
    for name, counts in found.items():
        operator = name.split()[0].removesuffix("_")  # the kernel is that of the functional form
        error = counts.pop("failed launch", "not noticed")
        assert re.match(rf"rope::{operator}_?: CUDA error: ", error), (name, error)
        for what, (got, expected) in counts.items():
            assert got == expected, (name, what)


def test_sources_call_nothing_that_waits():
    """Except for ROPE_EXT_CHECK=1, which copies the positions to the host through PyTorch."""
    waits = re.compile(r"\bcuda(\w*Synchronize|Memcpy\w*|Memset|Malloc\w*|Free\w*|StreamQuery)\b")
    suffixes = (".cu", ".cuh", ".cpp", ".h", ".inl")
    sources = [path for path in CSRC.rglob("*") if path.suffix in suffixes]
    assert len(sources) > 20
    assert [(p.name, m[0]) for p in sources for m in waits.finditer(p.read_text())] == []


if __name__ == "__main__":
    count(sys.argv[1])
