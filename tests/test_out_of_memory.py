"""If memory runs out, PyTorch's own exception is raised: programs recognise it by its words and its
type, and retry with less.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rope_ext
from rope_ext._operators import OPERATORS

rope = torch.ops.rope

B, S, D, P = 2**20, 2**20, 8, 4  # tensors without memory, but results of 2^45 bytes


def vast(*shape):
    return torch.zeros(shape[-1]).expand(shape)


X, TABLE, ROWS, INV_FREQ = vast(B, S, 1, D), vast(S, P), vast(B, S, P), torch.ones(P)
WEIGHT = torch.ones(D)
IDS = torch.zeros((), dtype=torch.int64).expand(B, S)
ALLOCATING = {
    "apply_rotary": (X, TABLE, TABLE),
    "apply_rotary_qk": (X, X, TABLE, TABLE),
    "apply_rotary_qk_at": (X, X, INV_FREQ),
    "rms_norm_rotary_qk": (X, X, WEIGHT, WEIGHT, TABLE, TABLE),
    "rms_norm_rotary_qk_backward": (X, X, X, X, WEIGHT, WEIGHT, TABLE, TABLE),
    "apply_rotary_table_backward": (X, X, None, None, ROWS),
    "cos_sin_cache": (INV_FREQ, B * S),
    "cos_sin": (INV_FREQ, IDS),
    "cos_sin_backward": (ROWS, ROWS, INV_FREQ, IDS),
}


def test_words_of_the_allocator_come_through():
    assert {operator.name for operator in OPERATORS if operator.result_count} == {*ALLOCATING}
    for operator, arguments in ALLOCATING.items():
        calls = [getattr(rope, operator)]
        calls += [getattr(rope_ext, operator)] if hasattr(rope_ext, operator) else []
        for call in calls:
            for mode in (torch.enable_grad, torch.inference_mode):
                with mode(), pytest.raises(RuntimeError) as error:
                    call(*arguments)
                words = f"{error.value.args} of {operator}"
                assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in words


def run_python(code):
    path = os.pathsep.join([str(Path(rope_ext.__file__).parent.parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


# The memory of the process is limited to 100 MB more than it has.
TRYING_AGAIN = """
import resource
import torch
import rope_ext
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size

torch.set_num_threads(1)
cos, sin = rope_ext.cos_sin_cache(torch.ones(32), 1024)
x = torch.ones(16, 1024, 16, 64, requires_grad=True)  # 64 MB
y = rope_ext.apply_rotary(x[:1], cos, sin)
y = rope_ext.apply_rotary(x, cos, sin)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 100_000_000, now + 100_000_000))

try:
    y.backward(x.detach())  # takes 64 MB twice
except RuntimeError as error:
    assert should_reduce_batch_size(error), error
    print("backward")

@find_executable_batch_size(starting_batch_size=16)
def rotate(batch):
    kept = [rope_ext.apply_rotary(x[:batch].detach(), cos, sin) for _ in range(3)]
    return batch

print(rotate())
"""


@pytest.mark.slow
def test_libraries_that_try_again_with_less_do_so():
    pytest.importorskip("accelerate")
    result = run_python(TRYING_AGAIN)
    backward, batch = result.stdout.split() or ["", result.stderr]
    assert backward == "backward"
    assert 1 <= int(batch) < 16


def test_type_of_the_exception_comes_through():
    """An allocator that raises like that of CUDA, for operators, functions and backward."""
    code = """
import torch
import rope_ext

cos, sin = rope_ext.cos_sin_cache(torch.ones(4), 8)
x = torch.ones(1, 8, 1, 8, requires_grad=True)
y = rope_ext.apply_rotary(x, cos, sin)
grad = torch.ones_like(y)

def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

library = torch.library.Library("aten", "IMPL")
for name in ("empty_like", "new_empty"):
    library.impl(name, out_of_memory, "CPU")
for mode in (torch.enable_grad, torch.inference_mode):
    for call in (
        lambda: torch.ops.rope.apply_rotary(x, cos, sin),
        lambda: rope_ext.apply_rotary(x, cos, sin),
        lambda: rope_ext.cos_sin_cache(torch.ones(4), 8),
        lambda: y.backward(grad),
    ):
        try:
            with mode():
                call()
        except torch.OutOfMemoryError as error:
            print(error)
"""
    result = run_python(code)
    words = ["CUDA out of memory. Tried to allocate 2.00 GiB."]
    assert result.stdout.splitlines() == 8 * words, result.stderr


@pytest.mark.cuda
def test_exception_of_a_device_comes_through():
    """For 2^60 bytes, which PyTorch refuses before it asks the device."""
    x = torch.ones(D, device="cuda").expand(B, S, 2**15, D)
    table = torch.ones(P, device="cuda").expand(S, P)
    for call in (rope.apply_rotary, rope_ext.apply_rotary):
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode(), pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
                call(x, table, table)
