"""Arguments for every operator, by the names in its schema."""

import functools
import itertools
from dataclasses import dataclass

import torch
from support import random, random_cache, random_positions, random_slots, random_table

import rope_ext

BLOCK_SIZE, RANK, AXES = 4, 3, 2
NOT_DEFAULT = {"bool": lambda default: not default, "float": lambda default: 0.5 * default}


@dataclass(frozen=True)
class Sizes:
    """Batch, sequence, heads of x and q, heads of k, channels, rows of a table."""

    B: int = 2
    S: int = 3
    H: int = 4
    K: int = 2
    D: int = 8
    L: int = 5


def tensors_of(
    sizes=None,
    *,
    seed=0,
    dtype=torch.float32,
    rows=False,
    packed=False,
    float8=True,
    positions_for_all=False,
    angles=False,
):
    """Values for the arguments of all operators, by name.

    seed: of the values. rows: cos and sin have a row for each token instead of a table. packed:
    tensors have no batch, and rows are [1, T, P]. float8: of caches, with scales, and of q.
    positions_for_all: gradients of angles are those of one sequence. angles: positions are float
    numbers, along several axes.
    """
    sizes = sizes or Sizes()
    B, S, H, K, D, L = sizes.B, sizes.S, sizes.H, sizes.K, sizes.D, sizes.L
    P, capacity = D // 2, BLOCK_SIZE * sizes.B * sizes.S
    tokens = (B * S,) if packed else (B, S)
    count = itertools.count(100 * seed + 1)  # the name and the seed decide the values

    def drawn(*shape):
        return random(*shape, dtype=dtype, seed=next(count))

    pool = {name: drawn(*tokens, H, D) for name in ("x", "q", "out", "out_q", "grad_q", "grad_x")}
    pool |= {name: drawn(*tokens, K, D) for name in ("k", "v", "out_k", "grad_k")}
    pool["k_pe"], pool["kv_c"] = drawn(*tokens, D), drawn(*tokens, RANK)
    table = (1, *tokens, P)[-3:] if rows else (L, P)
    pool["cos"], pool["sin"] = random_table(*table, dtype=dtype, seed=seed)
    pool["position_ids"] = random_positions(B, S, rows=L, seed=seed)
    if angles:
        pool["position_ids"] = drawn(AXES, B, S)
        pool["axes"] = random_positions(P, rows=AXES, seed=seed)
    positions = (S,) if positions_for_all else (B, S)
    pool |= {"grad_cos": drawn(*positions, P), "grad_sin": drawn(*positions, P)}
    pool |= {"inv_freq": drawn(P).abs(), "length": S}
    pool |= {name: drawn(D) for name in ("weight", "q_weight", "k_weight")}
    order = torch.randperm(B * S, generator=torch.Generator().manual_seed(seed))
    pool |= {"token_order": order, "row_offsets": torch.arange(L + 1).clamp(max=B * S)}
    pool["row_offsets"][-1] = B * S
    pool["slot_mapping"] = random_slots(*tokens, capacity=capacity, seed=seed)
    for name in ("old_position_ids", "new_position_ids"):
        pool[name] = drawn(B * S)
    pool["new_inv_freq"] = drawn(P).abs()
    if float8:
        pool |= {name: torch.full((1,), 0.5 + seed) for name in ("k_scale", "v_scale", "scale")}
    pool["x_out"] = random_cache(*tokens, H, D, dtype=torch.float8_e4m3fn, seed=next(count))
    pool |= {"group_size": D // 2, "scale_out": random(*tokens, H, 2, seed=next(count))}
    pool |= {"qkv": drawn(*tokens, H + 2 * K, D), "grad_v": drawn(*tokens, K, D)}
    pool |= {"q_heads": H, "kv_heads": K}
    blocks = (capacity // BLOCK_SIZE, BLOCK_SIZE)
    if float8:
        pool["q_out"] = random_cache(*tokens, H, D, dtype=torch.float8_e4m3fn)
        pool["q_scale_out"] = torch.zeros(*tokens, H)
    in_cache = torch.float8_e4m3fn if float8 else dtype
    pool |= {name: random_cache(*blocks, K, D, dtype=in_cache) for name in ("k_cache", "v_cache")}
    pool["kv_cache"] = random_cache(*blocks, RANK + D, dtype=in_cache)
    return pool


def arguments_of(operator, sizes=None, *, optional=True, **how):
    """The tensors of an operator by name, and its other arguments without default.

    optional: include arguments that may be None, with each flag the opposite of its default and
    each float half of it. how: as in tensors_of.
    """
    angles = operator.pairs == "inv_freq"
    pool = tensors_of(sizes, positions_for_all=not optional, angles=angles, **how)
    taken = {}
    for argument in operator.arguments:
        may_be_none = str(argument.type).startswith("Optional")
        needed = not may_be_none or argument.name in ("grad_q", "kv_heads")
        if argument.name in pool and (optional or needed):
            taken[argument.name] = pool[argument.name]
        elif optional and str(argument.type) in NOT_DEFAULT:
            taken[argument.name] = NOT_DEFAULT[str(argument.type)](argument.default_value)
        else:
            assert argument.has_default_value() or may_be_none, (
                f"no value for {argument.name} of {operator.op}: add one to the pool"
            )
            if not argument.has_default_value():
                taken[argument.name] = None
    if "old_position_ids" in taken:  # beside slots [N]
        taken["slot_mapping"] = taken["slot_mapping"].flatten()
    return taken


def function_of(operator):
    """The function of rope_ext with the arguments of an operator, if there is one."""
    name, _, out = operator.name.partition(".")
    function = getattr(rope_ext, name, None)
    if function is None and hasattr(rope_ext, name.removesuffix("_")):
        return functools.partial(getattr(rope_ext, name.removesuffix("_")), inplace=True)

    def into(**given):
        outs = tuple(given.pop(name) for name in operator.outs)
        return function(**given, out=outs if len(outs) > 1 else outs[0])

    return into if out else function


def results_of(function, given, written):
    """The results of a call, then the tensors that it has written."""
    returned = function(**given)
    returned = returned if isinstance(returned, tuple | list) else (returned,)
    tensors = (*returned, *(given.get(n) for n in written))
    return [x for x in tensors if isinstance(x, torch.Tensor)]
