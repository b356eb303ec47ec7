"""Hostile replacements of an argument. Each function takes the seed and the valid argument, and
returns a replacement; None if there is none of its kind; or the error that PyTorch raises for it.
"""

import warnings

import numpy as np
import torch
from random_arguments import Draw
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

FAKES = FakeTensorMode()
# All dtypes of PyTorch, without their aliases.
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
# Tensors of the other dtypes also need a scale (in_another_form).
TENSOR_DTYPES = [x for x in DTYPES if not str(x).startswith(("torch.qint", "torch.quint"))]
OF_NUMBERS = {6: torch.float32, 7: torch.float64}  # PyTorch's numbers of dtypes
LIMITS = (-1, 0, 1, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, -1.0, 5e-324, 1e-45, 1e-300, 1e38, 1e308, *map(float, ("nan", "inf", "-inf")))


def not_printed(dtype: torch.dtype) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            repr(torch.empty(1, dtype=dtype))
        except (RuntimeError, NotImplementedError):
            return True
    return False


NOT_PRINTED = set(filter(not_printed, TENSOR_DTYPES))


class Plain(torch.Tensor):
    """A subclass without changes."""


class Listening(torch.Tensor):
    """A subclass that sees every function and does nothing."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Deaf(torch.Tensor):
    """A subclass whose results are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Wrapper(torch.Tensor):
    """A tensor without data of its own, which only handles operators."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(),
            dtype=inner.dtype, device=inner.device,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Wrapper({self.inner})"

    def __format__(self, how):
        return repr(self)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(
            lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {})
        )
        result = function(*args, **kwargs)
        return tree_map(lambda x: Wrapper(x) if isinstance(x, torch.Tensor) else x, result)


# ---- replacements of a tensor: kinds


def no_tensor(d: Draw, t: torch.Tensor) -> object:
    t = torch.ones(3) if t.dtype in NOT_PRINTED else t  # PyTorch prints a refused tensor
    array = np.ones(tuple(t.shape)) if t.numel() < 1000 else np.ones(3)
    return d.choice((
        None, 3, 2.5, True, "cos", b"", [t], (t, t), {}, [1.0, 2.0], array, np.float32(1), object(),
        torch.float32, t.shape, torch.Tensor, lambda: t, torch.ones(3).untyped_storage(),
    ))  # fmt: skip


def subclass(d: Draw, t: torch.Tensor) -> torch.Tensor:
    kind = d.choice((Plain, Listening, Deaf, Wrapper, torch.nn.Parameter, torch.nn.Buffer))
    t = t.detach().as_subclass(torch.Tensor)
    if kind is Wrapper:  # PyTorch ignores the bits of the inner tensor
        return kind(t.resolve_conj().resolve_neg())
    if kind is torch.nn.Parameter:
        return kind(t, requires_grad=t.is_floating_point() and d.chance(0.5))
    return kind(t) if kind is torch.nn.Buffer else t.as_subclass(kind)


def without_data(d: Draw, t: torch.Tensor) -> torch.Tensor:
    return t.to("meta") if d.chance(0.5) else FAKES.from_tensor(t)


def in_another_form(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """A tensor without plain memory, or one that can't be written."""
    if max(t.shape, default=0) > 2**20:  # PyTorch would loop over 2^40 empty rows
        return None
    return d.choice((
        t.to_sparse, t.to_sparse_csr, t.to_mkldnn,
        lambda: torch.nested.nested_tensor([t, t]),
        lambda: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, d.choice((torch.qint8, torch.quint8))),
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    ))()  # fmt: skip


def lazy_bits(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """With the negative or the conjugate bit, or a copy-on-write tensor."""
    if d.chance(0.3):
        return torch._lazy_clone(t)
    if not t.is_floating_point() or t.dtype.itemsize == 1:
        return None
    if t.dtype == torch.bfloat16 or d.chance(0.5):
        return torch._neg_view(t)
    z = torch.complex(*(t if t.dtype == torch.float64 else t.float() for _ in range(2)))
    return d.choice((z.conj(), z.conj().imag))


def of_autograd(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    if d.chance(0.3):
        with torch.inference_mode():
            return t.clone()
    if not t.is_floating_point() or t.dtype.itemsize == 1:
        return None
    leaf = t.clone().requires_grad_()
    return d.choice((
        lambda: leaf, lambda: leaf * 1, lambda: leaf[...], lambda: (leaf * 1)[...],
        lambda: torch.stack((leaf, leaf)).unbind()[0],
    ))()  # fmt: skip


# ---- dtypes, shapes and strides


def dtype(d: Draw, t: torch.Tensor) -> torch.Tensor:
    to = d.choice(TENSOR_DTYPES)
    try:
        return t.to(to)
    except (RuntimeError, NotImplementedError):
        return torch.empty(t.shape, dtype=to)


def rank(d: Draw, t: torch.Tensor) -> torch.Tensor:
    return d.tensor(*(d.choice((0, 1, 2, 3, 5)) for _ in range(d.randint(0, 6)))).to(t.dtype)


def size(d: Draw, t: torch.Tensor) -> torch.Tensor:
    """One dimension more or less, or one dimension longer, shorter or empty."""
    if t.dim() == 0:
        return t[None]
    dim = d.randrange(t.dim())
    length = t.shape[dim]
    return d.choice((
        lambda: t.unsqueeze(dim),
        lambda: t.narrow(dim, 0, 1).squeeze(dim),
        lambda: t.narrow(dim, 0, length // 2),
        lambda: t.narrow(dim, 0, 0),
        lambda: t.narrow(dim, 0, length - 1),
        lambda: torch.cat((t, t), dim),
        lambda: torch.cat((t, t.narrow(dim, 0, 1)), dim),
        lambda: t.flatten(),
    ))()  # fmt: skip


def order(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """The same sizes in another order; or the same tensor in another order in memory."""
    if t.dim() < 2:
        return None
    dims = d.sample(range(t.dim()), t.dim())
    back = sorted(range(t.dim()), key=dims.__getitem__)
    return t.permute(dims) if d.chance(0.5) else t.permute(back).contiguous().permute(dims)


def strides(d: Draw, t: torch.Tensor) -> torch.Tensor:
    """Gaps, overlapping elements, and unusual strides."""
    dim = d.randrange(t.dim())
    far = d.choice((0, 2**31, 2**40, 2**62, 2**63 - 1))
    alone = [n <= 1 or t.numel() == 0 for n in t.shape]
    return d.choice((
        lambda: torch.stack((t, t), -1)[..., 0],
        lambda: torch.cat((t, t), dim).narrow(dim, 0, t.shape[dim]),
        lambda: torch.stack((t, t))[1],
        lambda: t.narrow(dim, 0, 1).expand(t.shape),
        lambda: t.as_strided(t.shape, np.where(alone, far, t.stride()).tolist()),
    ))()  # fmt: skip


def values(d: Draw, t: torch.Tensor) -> torch.Tensor:
    """An index or a number at the end of the valid range, or outside."""
    out = t.clone(memory_format=torch.contiguous_format)
    if t.dtype.itemsize == 1:
        out.view(torch.uint8).random_(generator=d.generator)
        return out
    numbers = FLOATS
    if not t.is_floating_point():
        sizes = (d.randrange(64) for _ in range(8))  # such as the number of rows, or of slots
        numbers = (*LIMITS, t.max().item() + d.choice((1, 3, 100)), *sizes)
    out.view(-1)[d.randrange(out.numel())] = d.choice(numbers)
    return out


OF_TENSORS = (no_tensor, subclass, without_data, in_another_form, lazy_bits, of_autograd, dtype,
              rank, size, order, strides, values)  # fmt: skip


# ---- replacements of a number or a word


def integer(d: Draw, value: object) -> object:
    near = value if isinstance(value, int) and abs(value) < 2**62 else 4
    return d.choice((
        *LIMITS, 2, 3, 2**63, 2**70, -(2**63) - 1, near + 1, near - 1, near * 2, True, False, None,
        float(near), 2.5, float("nan"), str(near), [near], torch.tensor(near), torch.tensor(2.5),
        np.int64(near), np.ones(2), torch.ones(2), np.float32(1), 1j, object(),
    ))  # fmt: skip


def boolean(d: Draw, value: object) -> object:
    return d.choice((
        True, False, None, 0, 1, 2, -1, 1.0, float("nan"), "yes", "", [], [1], torch.tensor(True),
        torch.tensor(1.5), np.bool_(True), np.ones(2), torch.ones(2), object(), 2**70,
    ))  # fmt: skip


def floating(d: Draw, value: object) -> object:
    return d.choice((
        *FLOATS, 1, 0, True, None, "1", [1.0], 1j, 2**70, 10**400, torch.tensor(2.0),
        torch.tensor(3), torch.ones(2), np.float32(2), np.float64(2), np.ones(2), object(),
    ))  # fmt: skip


def dtype_argument(d: Draw, value: object) -> object:
    others = None, 6, 7, 99, -1, 2**40, 1.0, True, "float32", float, np.float32, object()
    return d.choice((*DTYPES, *others))


def text(d: Draw, value: object) -> object:
    return d.choice((
        "bshd", "bhsd", "sbhd", "thd", "NHD", "HND", "BSHD", "", None, 3, b"bshd", [], {}, True,
        ("b", "s"), torch.ones(2), object(),
    ))  # fmt: skip


def is_dense(x: object) -> bool:
    """Whether x is a tensor with its own memory on the CPU that can be read."""
    return (
        isinstance(x, torch.Tensor)
        and not isinstance(x, torch._subclasses.FakeTensor | Wrapper)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not (x.is_quantized or x.is_nested or x._is_zerotensor())
    )
