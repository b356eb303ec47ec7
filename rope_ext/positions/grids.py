"""Images and volumes: the position of every patch on each axis."""

import torch
from torch import Tensor

from rope_ext._argument_errors import check_type
from rope_ext.positions.checks import Device, check_size, refuse

_NAMES = ("frames", "height", "width")


def grid(*sizes: int, merge: int = 1, device: Device = None) -> Tensor:
    """Positions of the patches of an image, ``grid(height, width)``, or of a video, ``grid(frames,
    height, width)``, on each axis.

    Args:
        sizes: patches along each axis, two or three of them.
        merge: 1: patches in row-major order, frames outermost. m: blocks of m x m patches of a
            frame follow one another, each in row-major order, for vision towers that merge a block
            into one token (spatial_merge_size). m divides height and width.
        device: of the result.

    Returns:
        int64 [A, tokens], A = 2 or 3: in patches, in the order of sizes.

    Raises:
        ValueError: for another number of sizes, negative ones, and ones that merge does not divide.

    Source: the order of merged patches is that of Qwen2-VL (transformers, get_vision_position_ids).
    """
    names = _check_sizes("grid", sizes)
    check_size("grid", "merge", merge, least=1)
    for name, size in zip(names[-2:], sizes[-2:], strict=True):
        if size % merge != 0:
            refuse("grid", f"{name} to be a multiple of merge, {merge}", size)
    axes = [torch.arange(size, device=device) for size in sizes]
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # [A, (frames,) height, width]
    if merge > 1:
        height, width = (size // merge for size in sizes[-2:])
        ids = ids.unflatten(-2, (height, merge)).unflatten(-1, (width, merge)).transpose(-3, -2)
    return ids.flatten(1)


def patch_centers(*sizes: int, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
    """Coordinates of the centres of patches, from -1 to 1 over each axis, for every size.

    The centre of patch i of n is at ``2 (i + 1/2) / n - 1``. In DINOv3 an angle is 2 pi times the
    coordinate times inv_freq.

    Args:
        sizes: patches along each axis: (height, width) or (frames, height, width).
        dtype: of the result: float32 or float64.
        device: of the result.

    Returns:
        [A, tokens], A = 2 or 3, in the order of :func:`grid`.

    Raises:
        ValueError: for another number of sizes, negative ones, or another dtype.

    Source: DINOv3 (transformers, get_patches_center_coordinates), with the same bits in float32.
    """
    _check_sizes("patch_centers", sizes)
    check_type("rope_ext.positions.patch_centers", "dtype", dtype, torch.dtype)
    if dtype not in (torch.float32, torch.float64):
        refuse("patch_centers", "dtype to be float32 or float64", dtype)
    # This order of operations gives the bits of DINOv3; (2 i + 1 - n) / n rounds differently.
    axes = [
        2 * ((torch.arange(size, dtype=dtype, device=device) + 0.5) / size) - 1 for size in sizes
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def _check_sizes(function: str, sizes: tuple[int, ...]) -> tuple[str, ...]:
    if len(sizes) not in (2, 3):
        refuse(function, "(height, width) or (frames, height, width)", sizes)
    names = _NAMES[-len(sizes) :]
    for name, size in zip(names, sizes, strict=True):
        check_size(function, name, size)
    return names
