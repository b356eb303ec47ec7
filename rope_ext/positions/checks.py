"""Checks of the functions of this package, and when values can be checked."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from rope_ext._argument_errors import check_type, shown
from rope_ext._torch_private import transforms_active

Device = torch.device | str | None


def refuse(function: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"rope_ext.positions.{function}: expected {expected}, got {got}")


def values_known(*tensors: Tensor | None) -> bool:
    """Whether values can be read. On a device that would wait for the device; in a graph, under a
    transform and in placeholder tensors there are none.
    """
    return (
        not torch.compiler.is_compiling()
        and not transforms_active()
        and all(t is None or (type(t) is Tensor and t.device.type == "cpu") for t in tensors)
    )


def check_size(function: str, name: str, value: Any, least: int | None = 0, hint: str = "") -> None:
    """Raises unless value is an integer of at least `least` (None: any) that PyTorch's integers
    hold. hint: for smaller ones.
    """
    integer = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if not integer or (least is not None and value < least):
        expected = "an integer" if least is None else f"an integer of at least {least}"
        refuse(function, f"{name} to be {expected}", shown(value) + (hint if integer else ""))
    if type(value) is int and values_known() and value.bit_length() > 63:
        refuse(function, f"{name} to be an integer of at most 63 bits", shown(value))


def check_tensor(function: str, name: str, value: Any) -> None:
    check_type(f"rope_ext.positions.{function}", name, value, Tensor)


def check_list(function: str, name: str, value: Any) -> None:
    check_type(f"rope_ext.positions.{function}", name, value, Sequence)


def check_integers(function: str, name: str, tensor: Tensor, *shapes: str) -> None:
    """Raises unless int32 or int64, with as many dimensions as one of the shapes, "[B, S]"."""
    check_tensor(function, name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        refuse(function, f"{name} of dtype int32 or int64", tensor.dtype)
    if tensor.dim() not in [shape.count(",") + 1 for shape in shapes]:
        refuse(function, f"{name} to have shape {' or '.join(shapes)}", list(tensor.shape))


def check_shape(function: str, name: str, tensor: Tensor, meaning: str, *sizes: int) -> None:
    """Raises for other sizes. meaning: the sizes by name, "[B, S]"."""
    check_tensor(function, name, tensor)
    if tuple(tensor.shape) != sizes:
        refuse(function, f"{name} to have shape {meaning}, {list(sizes)}", list(tensor.shape))


def check_device(function: str, name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    check_tensor(function, name, tensor)
    if tensor.device != other.device:
        refuse(function, f"{name} on the device of {of}, {other.device}", tensor.device)


def check_mask(function: str, attention_mask: Tensor) -> Tensor:
    """attention_mask as bool [B, S]: True for tokens, False for padding."""
    check_tensor(function, "attention_mask", attention_mask)
    counts = attention_mask
    if attention_mask.dtype is not torch.bool:
        if attention_mask.dtype not in (torch.int32, torch.int64):
            refuse(function, "attention_mask of dtype bool, int32 or int64", attention_mask.dtype)
        counts = attention_mask != 0
        if values_known(attention_mask) and (attention_mask[counts] != 1).any():
            refuse(function, "attention_mask of 0 and 1", attention_mask.unique().tolist())
    if attention_mask.dim() != 2:
        refuse(function, "attention_mask to have shape [B, S]", list(attention_mask.shape))
    return counts


def check_not_negative(function: str, name: str, tensor: Tensor, hint: str = "") -> None:
    """Raises for negative values, if values can be read."""
    if values_known(tensor) and (tensor < 0).any():
        index = (tensor < 0).nonzero()[0].tolist()
        got = f"{tensor[tuple(index)].item()} at index {index}"
        refuse(function, f"{name} of at least 0", got + hint)


def check_bounds(function: str, name: str, bounds: Tensor, least: int = 1) -> None:
    """Checks boundaries of sequences, except for their values. least: number of sequences."""
    check_integers(function, name, bounds, "[sequences + 1]")
    if bounds.shape[0] < least + 1:
        refuse(function, f"{name} to have shape [sequences + 1]", list(bounds.shape))


def check_lengths(
    function: str, name: str, bounds: list[int], multiple_of: int = 1, of: str = ""
) -> None:
    """Checks the lengths of the sequences between the values of the tensor `name`."""
    for i, (begin, end) in enumerate(pairwise(bounds)):
        length = end - begin
        if length < 0 or length % multiple_of != 0:
            expected = f"that is a multiple of {multiple_of}, {of}" if of else "of at least 0"
            refuse(function, f"sequence {i} of {name} to have a length {expected}", length)
