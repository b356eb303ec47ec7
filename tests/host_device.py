"""A device for tests without one, of the key PrivateUse1, whose tensors are in host memory.

Every operator of PyTorch runs as on the CPU, on the same memory. rope_ext has no kernels for it.
`waits` lists the operators for which the host would wait for a real device. As a program it checks
the operators there (tests/test_fallback.py).
"""

import ctypes
import warnings

import pytest
import torch
from operator_arguments import arguments_of, results_of
from support import assert_same_bits, cpu_without_kernels, random, random_table
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.dlpack import from_dlpack

import rope_ext
from rope_ext._operators import OPERATORS

DEVICE = "host_memory"
CPU, EXTERNAL = 1, 12  # of DLPack
waits = []

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _moved(x, device_type):
    """The same memory as a tensor on another device."""
    capsule = torch._C._to_dlpack(x.detach())
    data_of_device = _pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    (ctypes.c_int32 * 2).from_address(data_of_device)[:] = device_type, 0
    return from_dlpack(capsule)


def _on_cpu(operator, *args, **options):
    """Calls the operator with the same memory as tensors on the CPU."""
    of_moved = {}

    def to_cpu(x):
        if isinstance(x, torch.Tensor) and x.device.type == DEVICE:
            moved = _moved(x, CPU)
            of_moved[id(moved)] = moved, x
            return moved
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def back(x):
        if not isinstance(x, torch.Tensor):
            return x
        return of_moved[id(x)][1] if id(x) in of_moved else _moved(x, EXTERNAL)

    name = operator.name()
    if name == "aten::_copy_from":
        source, target = map(to_cpu, args[:2])
        if args[1].device.type == "cpu":
            waits.append(name)
        target.copy_(source)
        return args[1]
    if any(word in name for word in ("_local_scalar_dense", "nonzero", "aten::equal")):
        waits.append(name)
    args = [  # numbers that stand for tensors come as numbers
        torch.tensor(x) if isinstance(x, int | float) and str(of.type) == "Tensor" else x
        for x, of in zip(args, operator._schema.arguments, strict=False)
    ]
    resized = {}  # results without elements that the operator gives their size
    for key, x in options.items():
        if key.startswith("out") and isinstance(x, torch.Tensor) and x.numel() == 0:
            resized[key] = x, torch.empty(0, dtype=x.dtype)
    cpu_options = tree_map(to_cpu, options) | {key: new for key, (_, new) in resized.items()}
    results = operator(*tree_map(to_cpu, args), **cpu_options)
    for x, new in resized.values():
        of_moved[id(new)] = new, x
        x.data = _moved(new, EXTERNAL)
    return tree_map(back, results)


def register():
    _setup_privateuseone_for_python_backend(DEVICE)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_on_cpu, "PrivateUse1")
    return library


def check_every_operator():
    """On the device as on the CPU as a device without kernels: bits, waits, versions."""
    for operator in OPERATORS:
        given = arguments_of(operator)
        there = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        waits.clear()
        results = results_of(operator.overload, there, operator.written)
        assert waits == [], (operator.name, waits)
        with cpu_without_kernels():
            expected = results_of(operator.overload, given, operator.written)
        for got, want in zip(results, expected, strict=True):
            assert got.device.type == DEVICE
            assert got.stride() == want.stride()
            assert_same_bits(got, want, operator.name)
        assert [x._version for x in results] == [x._version for x in expected]


def check_functions():
    """Gradients, a position that no table has, refusals."""
    x, (cos, sin) = random(1, 4, 2, 8), random_table(4, 4)
    there = [t.to(DEVICE) for t in (x, cos, sin)]
    there[0].requires_grad_()
    x.requires_grad_()
    rope_ext.apply_rotary(*there).sum().backward()
    rope_ext.apply_rotary(x, cos, sin).sum().backward()
    assert_same_bits(there[0].grad, x.grad)
    ids = torch.tensor([0, 1, 4, 3])
    rotated = rope_ext.apply_rotary(*there, ids.to(DEVICE)).detach().cpu()
    assert rotated.isnan().any(-1).any(-1).tolist() == [[False, False, True, False]]
    refused = (
        ((there[0], cos, sin), {}, "cos on the device of x, privateuseone:0, got cpu"),
        ((there[0][..., :6], *there[1:]), {}, "twice the width of cos"),
        (
            (there[1].view(1, 4, 1, 4), *there[1:]),  # x and cos in one place
            {"rotary_dim": 4, "inplace": True},
            "share no memory with x, which is written",
        ),
    )
    for given, options, message in refused:
        with pytest.raises(RuntimeError, match=message):
            rope_ext.apply_rotary(*given, **options)


if __name__ == "__main__":
    library = register()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_every_operator()
        check_functions()
    of_us = [str(each.message) for each in said if "rope_ext" in str(each.message)]
    assert len(of_us) == 1, of_us
    assert "no kernels for tensors on host_memory" in of_us[0]
    print("as on the CPU")
