"""The calls of one token that bench_overhead.py times, what each is compared with, and its goal.

q [1, 1, 32, 128] and k [1, 1, 8, 128] in bfloat16 (Llama-3-8B), tables in float32.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import floors
import torch
import torch.distributed as dist
from common import FIRST_POSITION, Case
from other_libraries import Skip
from other_libraries_cpu import VLLM_LIBRARIES, Problem, make_vllm
from rotations_cpu import forward
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.models.llama import modeling_llama

import rope_ext
from rope_ext.integrations import reference_apis
from rope_ext.integrations.transformers.forms import recognize

HEADS, KEY_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 4096
BLOCKS, BLOCK_SIZE, LATENT, LATENT_ROTARY = 64, 16, 512, 64
FEW, MANY = 64, 1088  # positions of cos_sin; the kernel's time is in the difference

MUL, MUL_NEW = "q.mul_(1), k.mul_(1)", "the same and two empty_like"
NULL = "an operator of as many arguments that does nothing"
OPS, OPS_IN_PLACE = "torch.ops.rope.apply_rotary_qk", "torch.ops.rope.apply_rotary_qk_"
FUNCTION, IN_PLACE = "rope_ext.apply_rotary_qk", ", in place"
AT, MODULE = "rope_ext.apply_rotary_qk_at", "RotaryEmbedding"
POSITIONS, HEADS_FIRST = ", position_ids", ", bhsd"
ROWS, KERNEL = f"rope_ext.cos_sin of {FEW} positions", f"the kernel alone for {FEW} positions"
OWN, PATCHED = "apply_rotary_pos_emb of transformers", "the same in a patched model"
DTENSOR_MUL, DTENSOR = "DTensor q * 2.0", f"{FUNCTION} of DTensors"
APPEND_STEPS, APPEND = "rotation, two index_copy_", "rope_ext.apply_rotary_qk_append_kv_"
NORM_STEPS, NORM = "two F.rms_norm, rotation", "rope_ext.rms_norm_rotary_qk"
COMPILED = "torch.compile of "


class Goal(NamedTuple):
    """At most `most` of the unit: of the time of another call, or microseconds."""

    most: float
    unit: str  # "times", "us more than" or "us"

    def __str__(self) -> str:
        return f"<= {self.most:g} {self.unit}"


@dataclass(frozen=True)
class Call:
    function: Callable[[], object]
    floor: str = ""  # the call that it is compared with
    goal: Goal | None = None


AS_THE_FUNCTION = Goal(1, "us more than")


@dataclass
class Inputs:
    requires_grad: bool
    dtype: torch.dtype = torch.bfloat16
    module: nn.Module = field(
        default_factory=lambda: rope_ext.RotaryEmbedding(HEAD_DIM, max_position_embeddings=CONTEXT)
    )

    def heads(self, count: int, dim: int = HEAD_DIM) -> Tensor:
        x = torch.randn(1, 1, count, dim, dtype=self.dtype)
        return x.requires_grad_(self.requires_grad)

    @cached_property
    def qk(self) -> tuple[Tensor, Tensor]:
        return self.heads(HEADS), self.heads(KEY_HEADS)

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        return self.module.table(CONTEXT)  # not inference tensors, even in inference mode

    @cached_property
    def positions(self) -> Tensor:
        return torch.full((1, 1), FIRST_POSITION)


def all_calls(requires_grad: bool) -> dict[str, Call]:
    """By name; those that write only if nothing requires grad. DTensors need :func:`one_rank`."""
    given = Inputs(requires_grad)
    families = (rotations, modules, tables, norms, adapters, dtensors, compiled)
    found = {name: call for family in families for name, call in family(given).items()}
    if not requires_grad:
        for family in (rotations_in_place, appends, vllm):
            found |= family(given)
    return found


def rotations(given: Inputs) -> dict[str, Call]:
    (q, k), table, rope = given.qk, given.table, torch.ops.rope
    heads_first = q.transpose(1, 2), k.transpose(1, 2)
    function, at = rope_ext.apply_rotary_qk, rope_ext.apply_rotary_qk_at
    inv_freq = given.module.inv_freq
    goal = Goal(0.55, "times")
    x, y = q.detach(), k.detach()
    floor = Call(lambda: (torch.empty_like(x), torch.empty_like(y), x.mul_(1), y.mul_(1)))
    return {
        MUL_NEW: floor,
        OPS: Call(partial(rope.apply_rotary_qk, q, k, *table), MUL_NEW),
        FUNCTION: Call(partial(function, q, k, *table), MUL_NEW, goal),
        FUNCTION + HEADS_FIRST: Call(
            partial(function, *heads_first, *table, layout="bhsd"), MUL_NEW, goal
        ),
        AT: Call(partial(at, q, k, inv_freq, given.positions), MUL_NEW),
    }


def rotations_in_place(given: Inputs) -> dict[str, Call]:
    (q, k), table, rope = given.qk, given.table, torch.ops.rope
    function, at = rope_ext.apply_rotary_qk, rope_ext.apply_rotary_qk_at
    heads_first = q.transpose(1, 2), k.transpose(1, 2)
    least, goal = partial(floors.load().null_qk_, q, k, *table), Goal(0.4, "times")
    at = partial(at, q, k, given.module.inv_freq, given.positions, inplace=True)
    in_place = FUNCTION + IN_PLACE
    return {
        MUL: Call(lambda: (q.mul_(1), k.mul_(1))),
        NULL: Call(least),
        OPS_IN_PLACE: Call(partial(rope.apply_rotary_qk_, q, k, *table), MUL, Goal(2.5, "us")),
        in_place: Call(partial(function, q, k, *table, inplace=True), MUL, goal),
        in_place + HEADS_FIRST: Call(
            partial(function, *heads_first, *table, layout="bhsd", inplace=True), MUL, goal
        ),
        AT + IN_PLACE: Call(at, MUL),
        MODULE + IN_PLACE: Call(
            partial(given.module, q, k, inplace=True), in_place, AS_THE_FUNCTION
        ),
        MODULE + POSITIONS + IN_PLACE: Call(
            partial(given.module, q, k, given.positions, inplace=True),
            AT + IN_PLACE,
            AS_THE_FUNCTION,
        ),
    }


def vllm(given: Inputs) -> dict[str, Call]:
    """Its operator, in place, where it is installed; verified before it is timed."""
    shape = Case("Llama-3-8B", 1, 1, HEADS, KEY_HEADS, HEAD_DIM, HEAD_DIM)
    inv_freq, positions = given.module.inv_freq, given.positions
    rows = rope_ext.cos_sin(inv_freq, positions)
    problem = Problem(shape, *given.qk, positions, inv_freq, *rows)
    for name in VLLM_LIBRARIES:
        with contextlib.suppress(ImportError, Skip):
            return {f"vLLM, {name}": Call(forward(problem, make_vllm(name, problem)), MUL)}
    return {}


def modules(given: Inputs) -> dict[str, Call]:
    call = partial(given.module, *given.qk)
    return {
        MODULE: Call(call, FUNCTION, AS_THE_FUNCTION),
        MODULE + POSITIONS: Call(partial(call, given.positions), AT, AS_THE_FUNCTION),
    }


def tables(given: Inputs) -> dict[str, Call]:
    inv_freq = given.module.inv_freq
    few, many = (torch.arange(FIRST_POSITION, FIRST_POSITION + n) for n in (FEW, MANY))
    return {
        ROWS: Call(partial(rope_ext.cos_sin, inv_freq, few), KERNEL, Goal(1.3, "times")),
        KERNEL: Call(partial(rope_ext.cos_sin, inv_freq, many)),  # see kernel_alone
    }


def kernel_alone(few: list[float], many: list[float]) -> list[float]:
    """Seconds of the kernel for FEW positions, from calls with FEW and with MANY."""
    return [(b - a) * FEW / (MANY - FEW) for a, b in zip(few, many, strict=True)]


def appends(given: Inputs) -> dict[str, Call]:
    (q, k), table, positions = given.qk, given.table, given.positions
    v = given.heads(KEY_HEADS)
    caches = [torch.zeros(BLOCKS, BLOCK_SIZE, KEY_HEADS, HEAD_DIM, dtype=given.dtype) for _ in "kv"]
    flat = [cache.flatten(0, 1) for cache in caches]
    slot = torch.tensor([7])

    def steps() -> None:
        rope_ext.apply_rotary_qk(q, k, *table, positions, inplace=True)
        flat[0].index_copy_(0, slot, k[0])
        flat[1].index_copy_(0, slot, v[0])

    q_latent, k_pe = given.heads(HEADS, LATENT_ROTARY), given.heads(1, LATENT_ROTARY)
    kv_c = torch.randn(1, 1, LATENT, dtype=given.dtype)
    latent = torch.zeros(BLOCKS, BLOCK_SIZE, LATENT + LATENT_ROTARY, dtype=given.dtype)
    rows = [rows[:, : LATENT_ROTARY // 2] for rows in table]

    def latent_steps() -> None:
        rope_ext.apply_rotary_qk(q_latent, k_pe, *rows, positions, inplace=True)
        latent.flatten(0, 1).index_copy_(0, slot, torch.cat((kv_c, k_pe[:, :, 0]), -1)[0])

    name = "rope_ext.apply_rotary_mla_append_"
    return {
        APPEND_STEPS: Call(steps),
        APPEND: Call(
            partial(rope_ext.apply_rotary_qk_append_kv_, q, k, v, *caches, slot, *table, positions),
            APPEND_STEPS,
        ),
        "rotation, cat, index_copy_": Call(latent_steps),
        name: Call(
            partial(
                getattr(rope_ext, name.split(".")[1]),
                *(q_latent, k_pe, kv_c, latent, slot, *rows, positions),
            ),
            "rotation, cat, index_copy_",
        ),
    }


def norms(given: Inputs) -> dict[str, Call]:
    (q, k), table = given.qk, given.table
    weight = torch.ones(HEAD_DIM, dtype=given.dtype).requires_grad_(given.requires_grad)
    norm = partial(nn.functional.rms_norm, normalized_shape=(HEAD_DIM,), weight=weight, eps=1e-6)
    return {
        NORM_STEPS: Call(lambda: rope_ext.apply_rotary_qk(norm(q), norm(k), *table)),
        NORM: Call(partial(rope_ext.rms_norm_rotary_qk, q, k, weight, weight, *table), NORM_STEPS),
    }


def adapters(given: Inputs) -> dict[str, Call]:
    """A patched model's function, and those with the signatures of other libraries."""
    (q, k), (cos, sin) = given.qk, given.table
    at = slice(FIRST_POSITION, FIRST_POSITION + 1)
    of_channels = [torch.cat((rows[at], rows[at]), -1)[None].to(given.dtype) for rows in (cos, sin)]
    heads_first = q.transpose(1, 2), k.transpose(1, 2)
    own = modeling_llama.apply_rotary_pos_emb
    flash, llama = reference_apis.flash_attention, reference_apis.llama
    freqs_cis, patched = torch.complex(cos[at], sin[at]), recognize(own).replacement
    return {
        OWN: Call(partial(own, *heads_first, *of_channels)),
        PATCHED: Call(partial(patched, *heads_first, *of_channels), OWN, Goal(0.25, "times")),
        "reference_apis.flash_attention.apply_rotary_emb of q": Call(
            partial(flash.apply_rotary_emb, q, cos, sin, seqlen_offsets=FIRST_POSITION), FUNCTION
        ),
        "reference_apis.llama.apply_rotary_emb": Call(
            partial(llama.apply_rotary_emb, q, k, freqs_cis), FUNCTION
        ),
    }


def dtensors(given: Inputs) -> dict[str, Call]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k = (
        distribute_tensor(x.detach(), mesh, [Shard(2)]).requires_grad_(given.requires_grad)
        for x in given.qk
    )
    table = [distribute_tensor(rows, mesh, [Replicate()]) for rows in given.table]
    found = {
        DTENSOR_MUL: Call(lambda: q * 2.0),
        DTENSOR: Call(
            partial(rope_ext.apply_rotary_qk, q, k, *table), DTENSOR_MUL, Goal(2.5, "times")
        ),
    }
    if not given.requires_grad:
        call = partial(rope_ext.apply_rotary_qk, q, k, *table, inplace=True)
        found[DTENSOR + IN_PLACE] = Call(call, DTENSOR_MUL, Goal(2.5, "times"))
    return found


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compiled(given: Inputs) -> dict[str, Call]:
    """What a compiled program pays for a call; `mul` is a program that does as little."""
    (q, k), table = given.qk, given.table

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)

    mul = program(lambda q, k, cos, sin: (q * 2, k * 2))
    rotation = program(rope_ext.apply_rotary_qk)
    found = {
        COMPILED + "q * 2, k * 2": Call(partial(mul, q, k, *table)),
        COMPILED + FUNCTION: Call(partial(rotation, q, k, *table), COMPILED + "q * 2, k * 2"),
    }
    if not given.requires_grad:

        def rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
            rope_ext.apply_rotary_qk(q, k, cos, sin, inplace=True)

        found[COMPILED + FUNCTION + IN_PLACE] = Call(
            partial(program(rotate_in_place), q, k, *table), COMPILED + "q * 2, k * 2"
        )
    return found
