"""What may come in the place of an argument: each way takes the seed and the value that fits, and
gives another, or None where there is none of its kind.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from calls import Draw
from torch._subclasses import FakeTensorMode

FAKES = FakeTensorMode()
# All dtypes of PyTorch, without their second names.
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
# Tensors of the others need a scale too (in_another_form).
OF_TENSORS = [x for x in DTYPES if not str(x).startswith(("torch.qint", "torch.quint"))]

LIMITS = (-1, 0, 1, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, -1.0, 5e-324, 1e-45, 1e-300, 1e38, 1e308, *map(float, ("nan", "inf", "-inf")))


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Listening(torch.Tensor):
    """A subclass that sees every function, and lets it be."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Deaf(torch.Tensor):
    """A subclass whose results are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Wrapper(torch.Tensor):
    """A tensor without data of its own, which knows operators alone."""

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
        unwrap = lambda x: x.inner if isinstance(x, Wrapper) else x  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        wrap = lambda x: Wrapper(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, function(*args, **kwargs))


Way = Callable[[Draw, torch.Tensor], object]


# ---- kinds


def no_tensor(d: Draw, t: torch.Tensor) -> object:
    array = np.ones(tuple(t.shape)) if t.numel() < 1000 else np.ones(3)
    return d.choice((
        None, 3, 2.5, True, "cos", b"", [t], (t, t), {}, [1.0, 2.0], array, np.float32(1),
        object(), torch.float32, t.shape, torch.Tensor, lambda: t, t.untyped_storage() if is_dense(t) else 1,
    ))  # fmt: skip


def subclass(d: Draw, t: torch.Tensor) -> torch.Tensor:
    kind = d.choice((Plain, Listening, Deaf, Wrapper, torch.nn.Parameter, torch.nn.Buffer))
    t = t.detach().as_subclass(torch.Tensor)
    if kind is Wrapper:  # within one PyTorch looks at no bit
        return kind(t.resolve_conj().resolve_neg())
    if kind is torch.nn.Parameter:
        return kind(t, requires_grad=t.is_floating_point() and d.chance(0.5))
    return kind(t) if kind is torch.nn.Buffer else t.as_subclass(kind)


def without_data(d: Draw, t: torch.Tensor) -> torch.Tensor:
    return t.to("meta") if d.chance(0.5) else FAKES.from_tensor(t)


def in_another_form(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """Sparse, nested, quantised: what is no plain memory, or can't be written."""
    ways = (
        t.to_sparse, t.to_sparse_csr, t.to_mkldnn,
        lambda: torch.nested.nested_tensor([t, t]),
        lambda: torch.nested.nested_tensor([t, t], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, d.choice((torch.qint8, torch.quint8))),
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    )  # fmt: skip
    return d.choice(ways)()


def lazy_bits(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """With the negative or the conjugate bit, or a copy that is made when it is written."""
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
    return d.choice((lambda: leaf, lambda: leaf * 1, lambda: leaf.detach().requires_grad_(),
                     lambda: leaf[...], lambda: (leaf * 1).unbind()[0] if t.dim() and len(t) else leaf))()  # fmt: skip


# ---- dtypes, shapes and strides


def dtype(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    to = d.choice(OF_TENSORS)
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return t.to(to)
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return torch.empty(t.shape, dtype=to)
    return None


def rank(d: Draw, t: torch.Tensor) -> torch.Tensor:
    return d.tensor(*(d.choice((0, 1, 2, 3, 5)) for _ in range(d.randint(0, 6)))).to(t.dtype)


def size(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """A dimension more or less, or one longer, shorter, empty."""
    if t.dim() == 0:
        return t[None]
    dim = d.randrange(t.dim())
    length = t.shape[dim]
    return d.choice((
        lambda: t.unsqueeze(dim),
        lambda: t.narrow(dim, 0, 1).squeeze(dim) if length else None,
        lambda: t.narrow(dim, 0, length // 2),
        lambda: t.narrow(dim, 0, 0),
        lambda: t.narrow(dim, 0, max(length - 1, 0)),
        lambda: torch.cat((t, t), dim) if t.dtype.itemsize > 1 else None,
        lambda: torch.cat((t, t.narrow(dim, 0, 1)), dim) if length and t.dtype.itemsize > 1 else None,
        lambda: t.flatten(),
    ))()  # fmt: skip


def order(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """The same sizes in another order; or the same tensor in another order in memory."""
    if t.dim() < 2:
        return None
    dims = d.sample(range(t.dim()), t.dim())
    moved = t.permute(dims)
    return moved if d.chance(0.5) else t.permute(np.argsort(dims).tolist()).contiguous().permute(dims)


def strides(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    """Gaps, elements in one place, and strides that no one follows."""
    if t.dim() == 0:
        return None
    dim = d.randrange(t.dim())
    way = d.choice(("apart", "offset", "one place", "far"))
    if way == "apart":
        return torch.stack((t, t), -1)[..., 0] if d.chance(0.5) else torch.cat((t, t), dim).narrow(dim, 0, t.shape[dim])  # fmt: skip
    if way == "offset":
        return torch.stack((t, t))[1]
    if way == "one place":
        return t.narrow(dim, 0, 1).expand(t.shape) if t.shape[dim] else None
    far = d.choice((0, 2**31, 2**40, 2**62, 2**63 - 1))
    of_one = [far if n <= 1 or t.numel() == 0 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    with contextlib.suppress(RuntimeError):
        return t.as_strided(t.shape, of_one)
    return None


# ---- values


def values(d: Draw, t: torch.Tensor) -> torch.Tensor | None:
    if not is_dense(t) or t.numel() == 0 or t.dtype.is_complex:
        return None
    out = t.clone(memory_format=torch.contiguous_format)
    if t.is_floating_point():
        value = d.choice(FLOATS)
        if t.dtype.itemsize == 1:
            out.view(torch.uint8).random_(generator=d.generator)
            return out
    else:
        value = d.choice((*LIMITS, out.max().item() + d.choice((1, 3, 100))))
        if out.dtype == torch.bool or not torch.iinfo(out.dtype).min <= value <= torch.iinfo(out.dtype).max:
            return None
    out.view(-1)[d.randrange(out.numel())] = value
    return out


TENSORS: dict[str, Way] = {
    way.__name__: way
    for way in (no_tensor, subclass, without_data, in_another_form, lazy_bits, of_autograd,
                dtype, rank, size, order, strides, values)
}  # fmt: skip


# ---- numbers


def integer(d: Draw, value: object) -> object:
    small = value if isinstance(value, int) and abs(value) < 2**62 else 4
    return d.choice((
        *LIMITS, 2, 3, 2**63, 2**70, -(2**63) - 1, small + 1, small - 1, small * 2, True, False, None,
        float(small), 2.5, float("nan"), str(small), [small], torch.tensor(small), torch.tensor(2.5),
        np.int64(small), np.ones(2), torch.ones(2), np.float32(1), 1j, object(),
    ))  # fmt: skip


def boolean(d: Draw, value: object) -> object:
    return d.choice((
        True, False, None, 0, 1, 2, -1, 1.0, float("nan"), "yes", "", [], [1], torch.tensor(True),
        torch.tensor(1.5), np.bool_(True), np.ones(2), torch.ones(2), object(), 2**70,
    ))  # fmt: skip


def floating(d: Draw, value: object) -> object:
    return d.choice((
        *FLOATS, 1, 0, True, None, "1", [1.0], 1j, 2**70, 10**400, torch.tensor(2.0), torch.tensor(3),
        torch.ones(2), np.float32(2), np.float64(2), np.ones(2), object(),
    ))  # fmt: skip


def dtype_argument(d: Draw, value: object) -> object:
    return d.choice((*DTYPES, None, 6, 7, 99, -1, 2**40, 1.0, True, "float32", float, np.float32, object()))


def text(d: Draw, value: object) -> object:
    return d.choice(("bshd", "bhsd", "sbhd", "thd", "NHD", "HND", "BSHD", "", None, 3, b"bshd", [], {}, True,
                     ("b", "s"), torch.ones(2), object()))  # fmt: skip


def is_dense(t: object) -> bool:
    """Whether it has memory of its own on the CPU that can be looked at."""
    return (
        isinstance(t, torch.Tensor)
        and not isinstance(t, torch._subclasses.FakeTensor | Wrapper)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and not t.is_quantized
        and not t._is_zerotensor()
        and not t.is_nested
    )


def is_printed(x: object) -> bool:
    try:
        repr(x)
    except (RuntimeError, NotImplementedError):
        return False
    return True
