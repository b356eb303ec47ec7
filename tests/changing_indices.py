"""Calls each operator that takes indices while a thread changes one of them to invalid and back.

`python changing_indices.py SECONDS` is a separate program: a kernel that trusts an index after its
check would crash. A call either raises the error of the check, or gives the same numbers as for the
valid index, except for the results of the invalid index: these are NaN, or were not stored.
"""

import re
import sys
import time
from threading import Event, Thread

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from support import CPU_CODE

import rope_ext
from rope_ext import _C

rope = torch.ops.rope

B, S, H, K, D, P, L = 2, 300, 4, 2, 64, 32, 700
RANK, BLOCK = 96, 16  # of a latent; of a cache
FAR = 2**40
RUN, ROUNDS = 1000, 100  # writes of one value, of all values
INDICES = "position_ids", "slot_mapping", "axes", "token_order", "row_offsets"
CHECKED = re.compile(rf"rope::\w+: expected ({'|'.join(INDICES)}) ")


def calls():
    """The calls by name: a function, and the index tensor that it reads."""
    q, k = torch.randn(B, S, H, D), torch.randn(B, S, K, D)
    x = torch.randn(B, S, H, D, dtype=torch.bfloat16)
    grads = torch.ones_like(q), torch.ones_like(k)
    cos, sin = torch.randn(L, P), torch.randn(L, P)
    ids = torch.randperm(L)[: B * S].view(B, S)
    slots = torch.randperm(L)[: B * S].view(B, S)
    order = torch.randperm(B * S)
    offsets = torch.linspace(0, B * S, L + 1).long()
    weight, qkv = torch.randn(D), torch.randn(B, S, H + 2 * K, D)
    inv_freq, _ = rope_ext.frequencies.default(D)
    axes, places = torch.arange(P) % 3, torch.randint(0, 5000, (3, B, S))

    def append():
        own_q, own_k, caches = q.clone(), k.clone(), torch.zeros(2, L // BLOCK + 1, BLOCK, K, D)
        rope_ext.apply_rotary_qk_append_kv_(own_q, own_k, k, *caches, slots, cos, sin, ids)
        return own_q, own_k, caches

    def append_latent():
        own_q, k_pe, latent = q.clone(), k[:, :, 0].clone(), torch.ones(B, S, RANK)
        cache = torch.zeros(L // BLOCK + 1, BLOCK, RANK + D)
        arguments = own_q, k_pe, latent, cache, slots, cos, sin, ids
        rope_ext.apply_rotary_mla_append_(*arguments, interleaved=True, interleaved_out=False)
        return own_q, k_pe, cache

    def quantize():
        result = torch.empty(q.shape, dtype=torch.float8_e4m3fn), torch.empty(B, S, H, 1)
        how = {"x_out": result[0], "scale_out": result[1], "group_size": D}
        rope_ext.apply_rotary_quantize(q, cos, sin, ids, **how)
        return result[0].float(), result[1]

    def shift():
        cache = torch.ones(L // BLOCK + 1, BLOCK, K, D)
        flat = slots.view(-1)
        rope_ext.shift_cached_k_(cache, flat, flat * 0, flat * 0 + 7, inv_freq)
        return (cache - 1,)  # 0 for a key that was not moved

    def table_backward():
        rope.apply_rotary_table_backward(grads[0], q, grads[1], k, cos, order, offsets)
        return ()

    def backward():
        leaves = [t.clone().requires_grad_() for t in (q, cos)]
        torch.autograd.grad(rope_ext.apply_rotary(*leaves, sin, ids), leaves, grads[0])
        return ()

    in_place = {"inplace": True}
    rows, ones = (cos, sin, ids), torch.ones(2, B, S, P)
    normed = q, k, weight, weight, *rows
    return {
        "apply_rotary": (lambda: (rope_ext.apply_rotary(x, *rows),), ids),
        "in place": (
            lambda: rope_ext.apply_rotary_qk(q.clone(), k.clone(), *rows, **in_place),
            ids,
        ),
        "append": (append, ids),
        "append, slots": (append, slots),
        "latent": (append_latent, ids),
        "latent, slots": (append_latent, slots),
        "quantize": (quantize, ids),
        "shift, slots": (shift, slots),
        "packed": (lambda: rope_ext.apply_rotary_qkv(qkv, *rows, kv_heads=K)[:2], ids),
        "normed": (lambda: rope_ext.rms_norm_rotary_qk(*normed), ids),
        "normed, in place": (
            lambda: (rope_ext.rms_norm_rotary(x.clone(), weight, *rows, inplace=True),),
            ids,
        ),
        "normed, backward": (lambda: rope.rms_norm_rotary_qk_backward(*grads, *normed)[:2], ids),
        "gradient to the table, tokens": (table_backward, order),
        "gradient to the table, rows": (table_backward, offsets),
        "backward": (backward, ids),
        "angles": (lambda: rope_ext.cos_sin(inv_freq, places, axes=axes), axes),
        "angles, backward": (lambda: (rope.cos_sin_backward(*ones, inv_freq, places, axes),), axes),
        "by angles": (lambda: rope_ext.apply_rotary_qk_at(q, k, inv_freq, places, axes=axes), axes),
    }


def stress(name, call, indices, seconds):
    """How often the call succeeded, and how often it raised."""
    expected = call()
    last = indices.view(-1).numpy()[-1:]  # checked last, and used much later
    values = np.tile(np.repeat((FAR, last[0], -FAR, last[0]), RUN), ROUNDS)
    writes = as_strided(last, values.shape, (0,))  # all write one element, without the interpreter
    stop = Event()

    def change():
        while not stop.is_set():
            np.copyto(writes, values)

    thread = Thread(target=change)
    thread.start()
    through = raised = 0
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline or through == 0:
            try:
                results = call()
            except RuntimeError as error:
                if not CHECKED.match(str(error)):
                    raise
                raised += 1
                continue
            through += 1
            for got, want in zip(results, expected, strict=True):
                absent = got.isnan() | (got == 0)
                assert torch.equal(got.where(~absent, want), want), f"{name}: a wrong number"
    finally:
        stop.set()
        thread.join()
    return through, raised


def main(seconds):
    sys.setswitchinterval(1e-5)  # otherwise the thread runs for 5 ms before a call can start
    torch.set_num_threads(1)
    every = calls()
    for capability in CPU_CODE:
        try:
            _C.set_cpu_capability(capability)
        except RuntimeError:  # the processor lacks the instructions
            continue
        for name, (call, indices) in every.items():
            counts = stress(name, call, indices, seconds / len(every) / len(CPU_CODE))
            print(capability, name, *counts, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
