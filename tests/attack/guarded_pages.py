"""Tensors whose first or last byte borders on a page that must not be accessed."""

import ctypes
import mmap

import torch
from calls import ANY_STRIDES, CONTIGUOUS
from random_arguments import Draw

PAGE, PROT_NONE = mmap.PAGESIZE, 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages:
    """Bytes between two pages that can't be read or written."""

    def __init__(self, pages: int) -> None:
        size = pages * PAGE
        memory = mmap.mmap(-1, size + 2 * PAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (begin, begin + PAGE + size):
            if _libc.mprotect(guard, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.memory = memory
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=PAGE)


class Arena:
    """Pages for the tensors of a case, reused by the next case."""

    def __init__(self) -> None:
        self.free: dict[int, list[Pages]] = {}
        self.taken: list[tuple[int, Pages]] = []

    def bytes(self, count: int) -> Pages:
        pages = -(-count // PAGE)
        free = self.free.setdefault(pages, [])
        taken = free.pop() if free else Pages(pages)
        self.taken.append((pages, taken))
        return taken

    def reset(self) -> None:
        for pages, taken in self.taken:
            self.free[pages].append(taken)
        self.taken.clear()


def strides_of(d: Draw, t: torch.Tensor, name: str) -> list[int]:
    """Strides for the dimensions in any order in memory, with gaps."""
    if name in CONTIGUOUS:
        return list(t.stride())
    strides, order = list(t.stride()), list(range(t.dim()))
    any_last = name in ANY_STRIDES
    if d.chance(0.5):
        free = order if any_last else order[:-1]
        order = d.sample(free, len(free)) + order[len(free) :]
    extent = d.choice((1, 1, 2, 3)) if any_last else 1
    for dim in reversed(order):
        strides[dim] = extent
        if t.shape[dim] > 1:
            extent = extent * t.shape[dim] + d.choice((0, 0, 0, 1, 2, 5, 8))
        elif d.chance(0.1) and (any_last or dim < t.dim() - 1):
            strides[dim] = d.choice((0, 1, 2**40, 2**62 // t.element_size()))
    return strides


def placed(arena: Arena, d: Draw, t: torch.Tensor, name: str, *, is_written: bool) -> torch.Tensor:
    """A copy of t at one end of its pages, up to 15 bytes off: not always a multiple of the element
    size, like weights in a file that is mapped to memory. In tensors that are not written, elements
    may overlap.
    """
    strides, size, extent = strides_of(d, t, name), t.element_size(), 0
    in_one_place = not is_written and name != "slot_mapping" and t.dim() > 1 and d.chance(0.1)
    if in_one_place:
        strides[d.randrange(t.dim() - 1)] = d.choice((0, 1, 3))
    if t.numel():
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    pages = arena.bytes(extent * size + 16)
    pages.bytes.random_(generator=d.generator)
    off = d.randrange(16)
    first = off if d.chance(0.5) else len(pages.bytes) - extent * size - off
    span = torch.frombuffer(pages.memory, dtype=t.dtype, count=max(extent, 1), offset=PAGE + first)
    view = span.as_strided(t.shape, strides)
    if in_one_place:
        span[torch.arange(extent).as_strided(t.shape, strides)] = t
    else:
        view.copy_(t)
    return view
