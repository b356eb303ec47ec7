"""Positions of a rank's tokens, if sequences are split across ranks (context parallelism).

They serve as position_ids: ``cos_sin(inv_freq, positions.context_parallel(..., device=x.device))``
gives the rows of a rank's tokens, once a step, for all layers.
"""

import torch
from torch import Tensor

from rope_ext.positions.checks import (
    Device,
    check_bounds,
    check_lengths,
    check_size,
    refuse,
    values_known,
)


def context_parallel(
    seq_len: int,
    world: int,
    rank: int,
    load_balanced: bool = True,
    *,
    cu_seqlens: Tensor | None = None,
    device: Device = None,
) -> Tensor:
    """Positions of a rank's tokens in their sequence.

    Load-balanced, a sequence is cut into 2 * world chunks, and rank r has chunk r and chunk
    2 * world - 1 - r, in this order: with a causal mask all ranks then have the same work.
    Otherwise it is cut into world chunks, and rank r has chunk r. Packed sequences are cut one by
    one.

    Args:
        seq_len: tokens of the whole sequence, S, or of all packed sequences together, T.
        world: ranks that share the sequence.
        rank: this rank, 0 <= rank < world.
        load_balanced: two chunks for each rank, from both ends (zig-zag), instead of one.
        cu_seqlens: int32 or int64 [sequences + 1]: where each packed sequence starts in the whole
            batch, and T at the end. Every length is a multiple of the number of chunks. Values are
            checked only on the CPU, as reading them would wait for the device.
        device: of the result, usually that of the rank's tokens, ``x.device``. None: that of
            cu_seqlens, or PyTorch's default device, the CPU.

    Returns:
        int64 [S / world] or [T / world], in tokens. ``x[:, context_parallel(...)]`` selects the
        rank's tokens of x [B, S, ...]; for packed ones see :func:`context_parallel_indices`.

    Raises:
        ValueError: for a length that is not a multiple of the chunks, a rank outside of
            [0, world), and cu_seqlens that are not boundaries of seq_len tokens.

    Source: ring attention with load balance as in Megatron-LM (get_batch_on_this_cp_rank),
    TransformerEngine (thd_get_partitioned_indices) and torch.distributed.tensor.experimental.
    """
    function = "context_parallel"
    indices, starts = _tokens(function, seq_len, world, rank, load_balanced, cu_seqlens, device)
    return indices if starts is None else (indices - starts).to(device)


def context_parallel_indices(
    seq_len: int,
    world: int,
    rank: int,
    load_balanced: bool = True,
    *,
    cu_seqlens: Tensor | None = None,
    device: Device = None,
) -> Tensor:
    """Which tokens a rank has: indices into the whole sequence, or into the packed batch.

    Arguments, errors and source are those of :func:`context_parallel`.

    Returns:
        int64 [S / world] or [T / world]: ``x[context_parallel_indices(...)]`` selects the rank's
        tokens of packed x [T, ...]. The indices of all ranks, one after the other, are a
        permutation, whose ``argsort()`` brings gathered tokens back into order.
    """
    function = "context_parallel_indices"
    return _tokens(function, seq_len, world, rank, load_balanced, cu_seqlens, device)[0].to(device)


def _tokens(
    function: str,
    seq_len: int,
    world: int,
    rank: int,
    load_balanced: bool,
    cu_seqlens: Tensor | None,
    device: Device,
) -> tuple[Tensor, Tensor | None]:
    """Indices of the rank's tokens, and for packed ones the start of each token's sequence. They
    are made on the device of cu_seqlens, or else on `device`: a copy would wait for it.
    """
    chunks = _check(function, seq_len, world, rank, load_balanced, cu_seqlens)
    made_on = device if cu_seqlens is None else cu_seqlens.device
    token = torch.arange(seq_len // world, device=made_on)
    if cu_seqlens is None:
        begin, chunk = 0, seq_len // chunks
        starts = None
    else:
        bounds = cu_seqlens.long()
        # A rank has an equal share of each sequence, in order, which gives each token's sequence.
        sequence = torch.searchsorted(bounds[1:] // world, token, right=True)
        starts = bounds[sequence]
        # There is no sequence after the last; unchecked values may lead there.
        ends = bounds[(sequence + 1).clamp(max=len(bounds) - 1)]
        begin, chunk = starts, (ends - starts) // chunks
    within = token - begin // world
    if load_balanced:
        # The second chunk is number 2 world - 1 - rank; `within` is past the first chunk already.
        number = torch.where(within < chunk, rank, 2 * world - 2 - rank)
    else:
        number = rank
    return begin + number * chunk + within, starts


def _check(
    function: str,
    seq_len: int,
    world: int,
    rank: int,
    load_balanced: bool,
    cu_seqlens: Tensor | None,
) -> int:
    """Checks the arguments and returns the number of chunks."""
    check_size(function, "world", world, least=1)
    check_size(function, "rank", rank)
    check_size(function, "seq_len", seq_len)
    if not 0 <= rank < world:
        refuse(function, f"rank in [0, {world}), of world ranks", rank)
    chunks = 2 * world if load_balanced else world
    of = f"the chunks of {world} ranks"
    if seq_len % chunks != 0:
        refuse(function, f"seq_len to be a multiple of {chunks}, {of}", seq_len)
    if cu_seqlens is None:
        return chunks
    check_bounds(function, "cu_seqlens", cu_seqlens)
    if not values_known(cu_seqlens):
        return chunks
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != seq_len:
        got = f"{bounds[0]} to {bounds[-1]}"
        refuse(function, f"cu_seqlens from 0 to seq_len, {seq_len}", got)
    check_lengths(function, "cu_seqlens", bounds, chunks, of)
    return chunks
