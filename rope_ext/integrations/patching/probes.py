"""Numbers and sizes of the arguments that functions are tested with."""

import math
from typing import Any

import torch
from torch import Tensor

# Sizes of q and k: all different, so that no axis can be mistaken for another.
BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 5, 4, 3, 16
# Widths of tables: all channels of a head or some, one angle a channel or one a pair.
WIDTHS = (HEAD_DIM, HEAD_DIM // 2, HEAD_DIM // 4)

Probe = tuple[list[Any], dict[str, Any]]


class Numbers:
    """Tensors of irregular numbers within 2, the same each time. Not random: transforms of
    functions may forbid random numbers.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.used = 0

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        index = torch.arange(self.used, self.used + size, dtype=torch.float64, device="cpu")
        self.used += size
        return (2 * torch.sin(index * index / math.sqrt(2))).view(shape).to(self.dtype)

    def complex(self, *shape: int) -> Tensor:
        return torch.complex(self(*shape).float(), self(*shape).float())

    def pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        return self(*shape), self(*shape)
