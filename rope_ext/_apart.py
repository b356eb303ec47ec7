"""q and k by tables of their own (xPos): two operators with the refusals of one.

An operator refuses before it writes. The second of two would refuse when the first has written, so
what it could find is looked at here, before both.
"""

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from rope_ext import _C


def check_apart(
    q: Tensor,
    k: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    position_ids: Tensor | None,
    written: dict[str, Tensor],
) -> None:
    """What apply_rotary_qk has to know of k, cos_k and sin_k before q is rotated by cos and sin.

    q, k: [B, S, H, D] or [T, H, D]. written: by name, what is to be written for q and for k, in the
    same order of dimensions; nothing where results are new.
    """
    cos, sin, cos_k, sin_k = tables
    read = {"q": q, "k": k, "cos": cos, "sin": sin, "cos_k": cos_k, "sin_k": sin_k}
    heads = q.dim() - 2
    if k.dim() != q.dim() or any(k.shape[d] != q.shape[d] for d in range(q.dim()) if d != heads):
        expected = f"k to have q's shape {list(q.shape)} in all but the number of heads"
        _refuse(expected, list(k.shape))
    _check_like("k", k, "q", q, shape=False)
    _check_like("cos_k", cos_k, "cos", cos)
    _check_like("sin_k", sin_k, "cos", cos)
    for (name, x), (of, like) in zip(written.items(), {"q": q, "k": k}.items(), strict=False):
        _check_like(name, x, of, like)
    for name, x in {"k": k, "cos_k": cos_k, "sin_k": sin_k, **written}.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel() > 0:
            _refuse(f"{name} to have stride 1 in its last dimension", f"strides {x.stride()}")
    if written:
        _check_memory(written, {**read, "position_ids": position_ids})


def _check_like(name: str, x: Tensor, of: str, other: Tensor, *, shape: bool = True) -> None:
    if shape and x.shape != other.shape:
        _refuse(f"{name} of {of}'s shape {list(other.shape)}", list(x.shape))
    if x.dtype != other.dtype:
        _refuse(f"{name} of {of}'s dtype {other.dtype}", x.dtype)
    if x.device != other.device:
        _refuse(f"{name} on the device of {of}, {other.device}", x.device)


def _check_memory(written: dict[str, Tensor], read: dict[str, Tensor | None]) -> None:
    """No element may be written twice, or read when it may have been written: what
    csrc/check/written.h sees to within one operator.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    for name, x in written.items():
        if x.is_neg() or x._is_zerotensor():
            _refuse(
                f"{name}, which is written, to have its values in memory",
                "a view that negates its elements, or zeros without memory",
            )
    tensors = {**read, **written}
    places = {name: _place(x) for name, x in tensors.items() if x is not None and _has_address(x)}
    for name in written:
        if name not in places:
            continue
        if _C.overlaps_itself(places[name]):
            got = f"strides {written[name].stride()} for shape {list(written[name].shape)}"
            _refuse(f"{name} to have no two elements in one place, as it is written", got)
        for other, place in places.items():
            if other != name and _C.overlap(places[name], place):
                expected = f"{other} to share no memory with {name}, which is written"
                _refuse(expected, "overlapping tensors")


def _has_address(x: Tensor) -> bool:
    """Not where a tensor stands for others, or has no elements; and of a shape that may be right:
    what isn't, the first operator refuses.
    """
    plain = type(x) in (Tensor, Parameter) and x.device.type != "meta"
    return plain and x.numel() > 0 and x.dim() <= 4


def _place(x: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return x.data_ptr(), x.element_size(), tuple(x.shape), x.stride()


def _refuse(expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"rope_ext.apply_rotary_qk: expected {expected}, got {got}")
