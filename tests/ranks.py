"""One process that acts as each rank in turn: if ranks do not communicate, their results can be
computed one by one and put together.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.debug import (
    CommDebugMode,
    _clear_fast_path_sharding_prop_cache,
    _clear_python_sharding_prop_cache,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

RANKS = 4


@contextlib.contextmanager
def as_rank(rank, world=RANKS):
    _clear_python_sharding_prop_cache()  # PyTorch's cache depends on the rank
    _clear_fast_path_sharding_prop_cache()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def place(tensor, mesh, *placements):
    """The rank's part of a tensor that every rank has as a whole."""
    if tensor is None:
        return None
    if placements and isinstance(placements[0], Partial):
        return DTensor.from_local(tensor.detach(), mesh, placements)
    everywhere = DTensor.from_local(tensor.detach(), mesh, [Replicate()] * mesh.ndim)
    if not placements:
        return everywhere
    return everywhere.redistribute(placements=placements).detach()


def assembled(parts):
    """The whole tensor from the parts on a one-dimensional mesh; checks their sizes."""
    (placement,) = parts[0].placements
    assert all(part.placements == (placement,) for part in parts)
    locals_ = [part.to_local() for part in parts]
    if placement.is_shard():
        whole = torch.cat(locals_, placement.dim)
    elif placement.is_partial():
        whole = torch.stack(locals_).sum(0)
    else:
        whole = locals_[0]
        wide = torch.float32 if whole.element_size() == 1 else whole.dtype  # float8 has no ==
        assert all(torch.equal(part.to(wide), whole.to(wide)) for part in locals_)
    assert {(part.shape, part.stride()) for part in parts} == {(whole.shape, whole.stride())}
    return whole


def on_every_rank(function):
    """function(mesh) -> DTensors, put together. No rank may communicate."""
    results = []
    for rank in range(RANKS):
        with as_rank(rank), CommDebugMode() as communication:
            results.append(function(init_device_mesh("cpu", (RANKS,))))
        assert communication.get_total_counts() == 0
    return [assembled(parts) for parts in zip(*results, strict=True)]
