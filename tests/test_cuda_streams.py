"""The operators launch on the current stream, never wait, and allocate only their outputs.

Capture in a CUDA graph requires that. A small library, loaded before the CUDA runtime, counts the
calls that a process makes to the runtime.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rope_ext

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"

# name -> (outputs and workspaces allocated, kernels launched)
EXPECTED = {
    "apply_rotary": (1, 1),
    "apply_rotary_qk": (2, 1),
    "apply_rotary_": (0, 1),
    "apply_rotary_qk_": (0, 1),
    "apply_rotary_qk_ with position_ids": (0, 1),
    "apply_rotary_qk_append_kv_": (0, 1),
    "apply_rotary_mla_append_": (0, 1),
    "apply_rotary_table_backward": (2, 1),
    "cos_sin_cache": (2, 1),
    "cos_sin": (2, 1),
    "cos_sin_backward": (2, 2),  # partial sums, then their sum
    "cos_sin with axes": (2, 1),
    "apply_rotary_qk_at": (2, 1),
    "apply_rotary_qk_at_ with axes": (0, 1),
}

SCRIPT = """
import ctypes, json, sys
import torch
import rope_ext

calls = ctypes.CDLL(sys.argv[1])
calls.calls_last_stream.restype = ctypes.c_void_p
rope = torch.ops.rope
inv_freq, _ = rope_ext.frequencies.default(64)
cos, sin = (t.cuda() for t in rope_ext.cos_sin_cache(inv_freq, 16))
q, k = torch.randn(2, 16, 4, 64).cuda(), torch.randn(2, 16, 2, 64).cuda()
v, ids = torch.randn(2, 16, 2, 64).cuda(), torch.arange(16).cuda()
inv_freq = inv_freq.cuda()
kv, slots = torch.zeros(2, 2, 16, 2, 64).cuda(), torch.arange(32).cuda()
latent, compressed = torch.zeros(2, 16, 40 + 64).cuda(), torch.randn(2, 16, 40).cuda()
ids = torch.arange(16).cuda()
three = torch.arange(48).view(3, 16).cuda()
inv_freq, axes = inv_freq.cuda(), (torch.arange(32) % 3).cuda()
functions = {
    "apply_rotary": lambda: rope.apply_rotary(q, cos, sin),
    "apply_rotary_qk": lambda: rope.apply_rotary_qk(q, k, cos, sin),
    "apply_rotary_": lambda: rope.apply_rotary_(q, cos, sin),
    "apply_rotary_qk_": lambda: rope.apply_rotary_qk_(q, k, cos, sin),
    "apply_rotary_qk_ with position_ids": lambda: rope.apply_rotary_qk_(q, k, cos, sin, ids),
    "apply_rotary_qk_append_kv_":
        lambda: rope.apply_rotary_qk_append_kv_(q, k, v, kv[0], kv[1], slots, cos, sin),
    "apply_rotary_mla_append_": lambda: rope.apply_rotary_mla_append_(
        q, k[:, :, :1], compressed, latent, slots, cos, sin),
    "apply_rotary_table_backward": lambda: rope.apply_rotary_table_backward(q, q, k, k, cos),
    "cos_sin_cache": lambda: rope.cos_sin_cache(inv_freq, 16),
    "cos_sin": lambda: rope.cos_sin(inv_freq, ids),
    "cos_sin_backward": lambda: rope.cos_sin_backward(cos, sin, inv_freq),
    "cos_sin with axes": lambda: rope.cos_sin(inv_freq, three, axes),
    "apply_rotary_qk_at": lambda: rope.apply_rotary_qk_at(q, k, inv_freq),
    "apply_rotary_qk_at_ with axes":
        lambda: rope.apply_rotary_qk_at_(q, k, inv_freq, three, axes),
}
stream = torch.cuda.Stream()
found = {}
for name, function in functions.items():
    function()  # what is set up once is set up now
    with torch.cuda.stream(stream):
        calls.calls_reset()
        result = function()
        found[name] = {
            "on the current stream": calls.calls_last_stream() == stream.cuda_stream,
            "launches": calls.calls_launches(),
            "allocations": calls.calls_allocations(),
            "synchronisations": calls.calls_synchronisations(),
        }
    calls.calls_report_error(719)  # cudaErrorLaunchFailure
    try:
        function()
        found[name]["failed launch"] = "not noticed"
    except RuntimeError as error:
        found[name]["failed launch"] = str(error)
    calls.calls_report_error(0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if rope_ext._C.build_info()["cudart"] != "shared":
        pytest.skip("the CUDA runtime is linked statically: its calls can't be seen")
    library = tmp_path_factory.mktemp("calls") / "calls.so"
    source = str(TESTS / "cuda_calls.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    preload = f"{library}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)],
        # without the caching allocator every allocation is a call
        env={**os.environ, "LD_PRELOAD": preload, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.cuda
@pytest.mark.parametrize("name", EXPECTED)
def test_operator_can_be_captured(name, found):
    allocations, launches = EXPECTED[name]
    assert {key: value for key, value in found[name].items() if key != "failed launch"} == {
        "on the current stream": True,
        "launches": launches,
        "allocations": allocations,
        "synchronisations": 0,
    }


@pytest.mark.cuda
@pytest.mark.parametrize("name", EXPECTED)
def test_failed_launch_raises_and_names_the_operator(name, found):
    operator = name.split()[0].removesuffix("_")  # the kernel is that of the functional form
    assert re.match(rf"rope::{operator}_?: CUDA error: ", found[name]["failed launch"])


def test_sources_call_nothing_that_waits():
    """Except for ROPE_EXT_CHECK=1, which copies the positions to the host through PyTorch."""
    waits = re.compile(r"\bcuda(\w*Synchronize|Memcpy\w*|Memset|Malloc\w*|Free\w*|StreamQuery)\b")
    sources = [
        path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h", ".inl")
    ]
    assert len(sources) > 20
    assert [(p.name, m[0]) for p in sources for m in waits.finditer(p.read_text())] == []
