"""Where the behaviour tests run: devices, and on the CPU both code paths."""

import pytest
import torch

from rope_ext import _C

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """The device to test on."""
    return torch.device(request.param)


@pytest.fixture(params=["avx2", "portable", CUDA])
def backend(request):
    """The device to test on, with each set of kernels that it has."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    before = _C.build_info()["cpu_capability"]
    use_cpu_kernels(request.param)
    yield torch.device("cpu")
    _C.set_cpu_capability(before)


@pytest.fixture(params=["avx2", "portable"])
def cpu_kernels(request):
    """Each set of kernels of the CPU, for what is tested there alone."""
    before = _C.build_info()["cpu_capability"]
    use_cpu_kernels(request.param)
    yield
    _C.set_cpu_capability(before)


@pytest.fixture
def avx2():
    """Skips where the processor has no AVX2, the path to compare the portable one with."""
    before = _C.build_info()["cpu_capability"]
    use_cpu_kernels("avx2")
    yield
    _C.set_cpu_capability(before)


@pytest.fixture
def threads():
    """Sets the number of threads; the old number is back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def use_cpu_kernels(name):
    try:
        _C.set_cpu_capability(name)
    except RuntimeError as error:
        pytest.skip(str(error))
