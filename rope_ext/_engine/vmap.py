"""The operators under torch.func.vmap: one call for all samples, whichever arguments are batched.

The batch becomes one of the operator's own dimensions: samples become sequences of x, rows of a
table, or frequencies. An operator without such a dimension is called once for each sample.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_vmap

from rope_ext._engine.autograd import last_stride_one
from rope_ext._engine.record import Given, Operator, VmapRule

Dims = dict[str, int | None]

# torch.library.register_vmap raises for an operator with a tensor keyword: a rule that raises an
# error is registered at the dispatch key instead.
_LIBRARY = torch.library.Library("rope", "IMPL")


def register_vmap_rules(operators: Sequence[Operator]) -> None:
    """Operators that write into out get no rule: PyTorch raises an error for them."""
    for operator in operators:
        if {*operator.written} - {*operator.rotates, *operator.outs}:
            _LIBRARY.impl(operator.name, _refusal(operator), "FuncTorchBatched")
        elif not operator.outs:
            register_vmap(operator.op, _as_registered(operator))


def _as_registered(operator: Operator) -> Callable[..., Any]:
    rule: VmapRule = operator.vmap or by_sequences
    unbatched = dict.fromkeys(operator.defaults)

    def registered(info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any) -> Any:
        dims = unbatched | operator.named(in_dims, {})
        if operator.written:
            _check_written_are_batched(operator, dims)
        return rule(operator, info.batch_size, dims, operator.given(args, options))

    return registered


def _refusal(operator: Operator) -> Callable[..., None]:
    """A rule that raises, for operators that write to a cache: all sequences share the cache."""

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError(
            f"{operator.op}: expected to be called with a batch of sequences, whose slots are "
            "those of one cache, got tensors batched by vmap"
        )

    return refuse


def _check_written_are_batched(operator: Operator, dims: Dims) -> None:
    if any(dims[name] is None for name in operator.written):
        raise RuntimeError(
            f"{operator.op}: expected what is written to be batched by vmap where another argument "
            "is, got a tensor that is the same for all samples"
        )


# The rule of operators that rotate by rows, and helpers of other rules


def by_sequences(operator: Operator, count: int, dims: Dims, given: Given) -> Any:
    """Samples become sequences. If other tensors (weights) are batched: one call a sample."""
    beside = {*operator.tensors} - {*operator.rotates, "cos", "sin", "position_ids"}
    if any(dims[name] is not None for name in beside):
        return one_by_one(operator, count, dims, given)
    samples = {name: samples_of(given[name], dims[name], count) for name in operator.rotates}
    first = samples[operator.rotates[0]]
    batch, seq = 1 if first.dim() == 4 else first.shape[1], first.shape[-3]
    inputs = {name: sequences(x) for name, x in samples.items()}
    outs = operator.functional(**{**given, **inputs, **_rows(count, batch, seq, dims, given)})
    outs = (outs,) if isinstance(outs, Tensor) else outs
    outs = tuple(out.unflatten(0, x.shape[: x.dim() - 3])
                 for out, x in zip(outs, samples.values(), strict=True))  # fmt: skip
    return _written_or_returned(operator, dims, given, outs)


def _written_or_returned(
    operator: Operator, dims: Dims, given: Given, outs: tuple[Tensor, ...]
) -> Any:
    """Results [N, ..] that an operator writes in place, or returns."""
    if not operator.written:
        return (outs, (0,) * len(outs)) if len(outs) > 1 else (outs[0], 0)
    for name, out in zip(operator.rotates, outs, strict=True):
        given[name].movedim(dims[name], 0).copy_(out)
    return None, None


def one_by_one(operator: Operator, count: int, dims: Dims, given: Given) -> Any:
    """One call for each sample."""

    def sample(name: str, i: int) -> Any:
        x, dim = given[name], dims[name]
        if dim is None:
            return x
        of_sample = x.select(dim, i)
        return last_stride_one(of_sample) if of_sample.dim() > 0 else of_sample

    function = operator.functional
    results = [function(**{name: sample(name, i) for name in given}) for i in range(count)]
    of_samples = [(out,) if isinstance(out, Tensor) else out for out in results]
    stacked = tuple(torch.stack(each) for each in zip(*of_samples, strict=True))
    return _written_or_returned(operator, dims, given, stacked)


def samples_of(x: Tensor, dim: int | None, count: int) -> Tensor:
    """x with the samples as first dimension [N, ..]; expanded if x is not batched."""
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def sequences(x: Tensor) -> Tensor:
    """[N, B, S, H, D] or packed [N, T, H, D] -> [N * B, S, H, D]; a view if strides allow it."""
    return last_stride_one(x if x.dim() == 4 else x.flatten(0, 1))


def _rows(count: int, batch: int, seq: int, dims: Dims, given: Given) -> dict[str, Tensor | None]:
    """cos, sin and position_ids of N * B sequences, from those of N samples of B sequences."""
    cos, sin, ids = given["cos"], given["sin"], given["position_ids"]
    batched_table = dims["cos"] is not None or dims["sin"] is not None
    batched_ids = dims["position_ids"] is not None
    if batched_table:
        cos, sin = (samples_of(given[name], dims[name], count) for name in ("cos", "sin"))
    if batched_ids:
        ids = ids.movedim(dims["position_ids"], 0)

    def each(t: Tensor, batched: bool, rank: int) -> Tensor:
        """t [..] or [1|B, ..], if batched with N before it -> [N * B, ..]; [..] has rank - 1."""
        t = t if batched else t[None]
        t = t.unsqueeze(1) if t.dim() == rank else t
        return t.expand(count, batch, *t.shape[2:]).flatten(0, 1)

    if cos.dim() - batched_table == 3:  # [1|B, S, W]
        if batched_table or cos.shape[0] != 1:
            cos, sin = each(cos, batched_table, 3), each(sin, batched_table, 3)
    elif batched_table and ids is None:  # each sample has the rows 0, 1, 2, ...
        cos, sin = each(cos[:, :seq], True, 3), each(sin[:, :seq], True, 3)
    elif batched_table:  # one table, which joins those of the samples
        length, ids = cos.shape[1], each(ids, batched_ids, 2)
        first = length * torch.arange(count, device=ids.device).repeat_interleave(batch)[:, None]
        outside = (ids < 0) | (ids >= length)  # of the sample's part of the table
        ids = torch.where(outside, -1, ids + first)
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    elif ids is not None and (batched_ids or ids.dim() == 2):
        ids = each(ids, batched_ids, 2)
    return {"cos": last_stride_one(cos), "sin": last_stride_one(sin), "position_ids": ids}
