"""Cases of the rotation: in place, out of place, forward and backward.

Creating a case verifies every result against float64: a wrong result of rope_ext ends the run, a
wrong result of another library leaves that library out.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import floors
import torch
from benchmark import FLOOR, OURS, PEER_IN_PLACE, Benchmark, Goal, Options
from common import DECODE_STRIDE, FIRST_POSITION, Case, matching
from other_libraries import Skip, reason
from other_libraries_cpu import OTHER_LIBRARIES, SLOW_TO_MAKE, Peer, Problem, angle_slack
from torch import Tensor
from verify import OURS_SLACK, PEERS_SLACK, check_rotation, exact_rows

import rope_ext

QUICK_TOKENS = 4096  # --quick: larger cases for rope_ext and transformers only


def make_problem(shape: Case, dtype: torch.dtype, options: Options) -> Problem:
    if options.max_tokens is not None:
        batch = min(shape.batch, options.max_tokens)
        shape = replace(shape, batch=batch, seq=min(shape.seq, options.max_tokens // batch))
    q, k = (
        torch.randn(shape.batch, shape.seq, heads, shape.head_dim, dtype=dtype)
        for heads in (shape.q_heads, shape.k_heads)
    )
    inv_freq, _ = rope_ext.frequencies.default(shape.head_dim, rotary_dim=shape.rotary_dim)
    if shape.seq == 1:
        positions = FIRST_POSITION + DECODE_STRIDE * torch.arange(shape.batch)[:, None]
    else:
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + shape.seq)[None]
    cos, sin = rope_ext.cos_sin(inv_freq, positions)
    return Problem(shape, q, k, positions, inv_freq, cos, sin)


def tables(problem: Problem) -> tuple[Tensor, Tensor]:
    """Tables of rope_ext: [S, P] for all sequences; rows [B, S, P] for decoding."""
    if problem.shape.seq == 1:
        return problem.cos, problem.sin
    return problem.cos[0], problem.sin[0]


def verify(
    problem: Problem,
    x: tuple[Tensor, ...],
    got: tuple[Tensor, ...],
    peer: Peer | None = None,
    **options: bool,
) -> None:
    """Verifies q and k [B, S, H, D] in x, rotated by a peer or by rope_ext."""
    cos, sin = exact_rows(problem.inv_freq, problem.positions)
    options["interleaved"] = problem.shape.interleaved if peer is None else peer.interleaved
    slack = OURS_SLACK if peer is None else PEERS_SLACK
    slack *= torch.finfo(problem.q.dtype).eps
    if peer is not None:
        slack += angle_slack(problem, peer.angle_roundings)
    for name, before, after in zip("qk", x, got, strict=True):
        check_rotation(name, after, before, cos, sin, slack=slack, **options)


def add_peers(
    benchmark: Benchmark,
    problem: Problem,
    options: Options,
    step: Callable[..., Callable[[], object]],
) -> None:
    many = problem.shape.tokens > QUICK_TOKENS
    for name in matching(list(OTHER_LIBRARIES), options.peers, "library"):
        slow = name in SLOW_TO_MAKE or (name != "transformers" and many)
        if options.quick and slow:
            benchmark.left_out[name] = "--quick"
            continue
        try:
            peer = OTHER_LIBRARIES[name](problem)
            function = step(problem, peer)
        except Exception as error:  # a failure must not stop the other peers
            benchmark.left_out[name] = reason(error)
        else:
            other = peer.interleaved != problem.shape.interleaved
            benchmark.add(peer.kind(problem), name + ", interleaved" * other, function)


def forward(problem: Problem, peer: Peer) -> Callable[[], object]:
    x = (problem.q, problem.k)
    if peer.results is None:
        call = functools.partial(peer.rotate, *(peer.layout(y) for y in x))
        got = tuple(peer.layout(y) for y in call())
    else:
        call, got = peer.rotate, peer.results
        if peer.kind(problem) == PEER_IN_PLACE:
            x = tuple(y.clone() for y in x)
        call()
    verify(problem, x, got, peer, sample=True)
    return call


def forward_to_new(problem: Problem, peer: Peer) -> Callable[[], object]:
    if peer.kind(problem) == PEER_IN_PLACE:
        raise Skip("in place only")
    return forward(problem, peer)


def training_step(problem: Problem, peer: Peer | None) -> Callable[[], object]:
    """Forward and backward of rope_ext, or of a peer. The incoming gradients are q and k."""
    if peer is None:
        cos, sin = tables(problem)
        peer = Peer(lambda q, k: rope_ext.apply_rotary_qk(q, k, cos, sin), False)
        ours = True
    else:
        ours = False
    if peer.results is not None:
        raise Skip("no gradient")
    grads = [peer.layout(x) for x in (problem.q, problem.k)]
    inputs = [x.detach().requires_grad_() for x in grads]

    def step() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = peer.rotate(*inputs)
        return outputs, torch.autograd.grad(outputs, inputs, grads)

    judged_as = None if ours else peer
    x = (problem.q, problem.k)
    outputs, gradients = ([peer.layout(y.detach()) for y in ys] for ys in step())
    verify(problem, x, outputs, judged_as, sample=True)
    verify(problem, x, gradients, judged_as, sample=True, inverse=True)
    return step


def in_place(
    shape: Case, dtype: torch.dtype, floor: str, limit: float, options: Options
) -> Benchmark:
    problem = make_problem(shape, dtype, options)
    q, k, (cos, sin) = problem.q, problem.k, tables(problem)
    given = {"interleaved": shape.interleaved}
    rotate = functools.partial(rope_ext.apply_rotary_qk, q, k, cos, sin, inplace=True, **given)
    before = q.clone(), k.clone()
    rotate()
    verify(problem, before, (q, k), sample=options.quick)
    del before

    benchmark = Benchmark([Goal("in place", floor, limit)])
    benchmark.add(OURS, "in place", rotate)
    operator = torch.ops.rope.apply_rotary_qk_
    benchmark.add(OURS, "torch.ops", functools.partial(operator, q, k, cos, sin, **given))
    moved = functools.partial(floors.load().rmw_qk_, q, k, cos, sin, **given)
    if shape.rotary_dim < shape.head_dim:
        only = functools.partial(moved, rotary_dim=shape.rotary_dim)
        benchmark.add(FLOOR, "rmw of the rotated lines", only)
    benchmark.add(FLOOR, "rmw", moved)
    if shape.seq == 1:
        null = functools.partial(floors.load().null_qk_, q, k, cos, sin, **given)
        words = [x.clone().view(torch.int32) for x in (q, k)]
        benchmark.add(FLOOR, "null", null)
        benchmark.add(FLOOR, "mul_", lambda: (q.mul_(1), k.mul_(1)))
        benchmark.add(FLOOR, "neg_", lambda: [x.neg_() for x in words])
    add_peers(benchmark, problem, options, forward)
    return benchmark


def out_of_place(shape: Case, dtype: torch.dtype, options: Options) -> Benchmark:
    problem = make_problem(shape, dtype, options)
    q, k, (cos, sin) = problem.q, problem.k, tables(problem)
    rotate = functools.partial(torch.ops.rope.apply_rotary_qk, q, k, cos, sin)
    verify(problem, (q, k), rotate(), sample=options.quick)
    benchmark = Benchmark([Goal("out of place", "clone", 1.05), Goal("out=", "copy", 1.15)])
    benchmark.add(OURS, "out of place", rotate)

    outputs = torch.empty_like(q), torch.empty_like(k)
    if hasattr(torch.ops.rope.apply_rotary, "out"):
        into = torch.ops.rope.apply_rotary.out

        def given_outputs() -> None:
            into(q, cos, sin, out=outputs[0])
            into(k, cos, sin, out=outputs[1])

        given_outputs()
        verify(problem, (q, k), outputs, sample=options.quick)
        benchmark.add(OURS, "out=", given_outputs)
    else:
        benchmark.left_out["out="] = "rope::apply_rotary has no overload `out`"

    copy = floors.load().copy_
    for name, streaming in (("copy", True), ("copy, plain stores", False)):
        benchmark.add(
            FLOOR,
            name,
            lambda streaming=streaming: (
                copy(outputs[0], q, streaming=streaming),
                copy(outputs[1], k, streaming=streaming),
            ),
        )
    benchmark.add(FLOOR, "clone", lambda: (q.clone(), k.clone()))
    add_peers(benchmark, problem, options, forward_to_new)
    return benchmark


def training(shape: Case, dtype: torch.dtype, options: Options) -> Benchmark:
    problem = make_problem(shape, dtype, options)
    q, k = problem.q, problem.k
    benchmark = Benchmark([Goal("forward and backward", "clone x4", 1.10)])
    benchmark.add(OURS, "forward and backward", training_step(problem, None))
    benchmark.add(FLOOR, "clone x4", lambda: (q.clone(), k.clone(), q.clone(), k.clone()))
    add_peers(benchmark, problem, options, training_step)
    return benchmark
