"""Positions of tokens: the position_ids of cos_sin, of the rotations and of KV caches.

Small functions of tensor operations: they run on every device and in compiled graphs, and never
wait for a device. Positions are int64, in tokens. Wrong values raise a ValueError that names the
function, the argument, the expected and the given value; a wrong type in place of a tensor raises a
TypeError. Values of tensors are checked only on the CPU.

The files::

    sequences.py    packed batches, tokens after those of a cache, padded batches
    paged_cache.py  slots of a paged KV cache, tokens of its sequences
    grids.py        images and volumes: one position for each axis
    multimodal.py   M-RoPE: text with images and videos; the axis of each pair
    ranks.py        context parallelism: the tokens of a rank
"""

from rope_ext.positions.grids import grid, patch_centers
from rope_ext.positions.multimodal import axial_axes, mrope, mrope_axes, mrope_batch, mrope_rows
from rope_ext.positions.paged_cache import seq_lens, slot_mapping
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
