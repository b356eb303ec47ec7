"""Where tokens are: the position_ids that cos_sin, the rotations and KV caches take.

Small functions of tensor operations: on every device, in compiled graphs, never waiting for a
device. Positions are int64, in tokens. What makes no sense raises a ValueError that names function,
argument, what was expected and what came, and what is no tensor, where one belongs, a TypeError;
values of tensors are looked at on the CPU alone.

The files::

    sequences.py  packed batches, tokens after those of a cache, padded batches
    pages.py      slots of a paged KV cache, tokens of its sequences
    grids.py      images and volumes: a position an axis
    multimodal.py M-RoPE: text with images and videos; which axis turns which pair
    ranks.py      context parallelism: the tokens of a rank
"""

from rope_ext.positions.grids import grid, patch_centers
from rope_ext.positions.multimodal import axial_axes, mrope, mrope_axes, mrope_batch, mrope_rows
from rope_ext.positions.pages import seq_lens, slot_mapping
from rope_ext.positions.ranks import context_parallel, context_parallel_indices
from rope_ext.positions.sequences import (
    from_attention_mask,
    from_cu_seqlens,
    from_offsets,
    sequence_of_tokens,
)

__all__ = [
    "axial_axes",
    "context_parallel",
    "context_parallel_indices",
    "from_attention_mask",
    "from_cu_seqlens",
    "from_offsets",
    "grid",
    "mrope",
    "mrope_axes",
    "mrope_batch",
    "mrope_rows",
    "patch_centers",
    "seq_lens",
    "sequence_of_tokens",
    "slot_mapping",
]
