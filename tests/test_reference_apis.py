"""Other libraries' signatures on the operators, compared to the library if it runs on a CPU, else
to its documented formula. flash-attention, Transformer Engine and torchtune have files of their
own; all of them are in the last section here.
"""

import inspect
from functools import partial
from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
import rotary_embedding_torch
import torch
from support import (
    DTYPES,
    LargeTensors,
    assert_same_bits,
    name_of,
    naming,
    random,
    random_positions,
    random_table,
    rounded_once,
)
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rope_ext import reference
from rope_ext.integrations.reference_apis import (
    flash_attention,
    llama,
    torch_functional,
    torchtune,
    transformer_engine,
)
from rope_ext.integrations.reference_apis import onnx as ours_of_onnx
from rope_ext.integrations.reference_apis import rotary_embedding_torch as ours_of_lucid

B, S, H, KH, D, L = 3, 11, 4, 2, 16, 40

BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def assert_near(got, expected):
    """Of the same shape and dtype, and within torch.testing's tolerance for it, a few roundings.

    For float64 the tolerance is that of float32: the libraries compute their tables in float32, as
    we do for float32 frequencies.
    """
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        low = {"rtol": 1.3e-6, "atol": 1e-5} if a.dtype == torch.float64 else {}
        torch.testing.assert_close(a, b, **low)


def assert_same_gradients(ours, theirs, *inputs):
    """Compares the gradients of both to every input, for the same random functional."""

    def gradients(function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = tree_leaves(function(*leaves))
        for i, y in enumerate(outputs):
            (y * random(*y.shape, dtype=y.dtype, seed=20 + i)).sum().backward(retain_graph=True)
        return [x.grad for x in leaves]

    for got, expected in zip(gradients(ours), gradients(theirs), strict=True):
        if got.dtype in (torch.float64, torch.float32):
            assert_near(got, expected)
        else:  # theirs is a sum of two rounded gradients of up to 4 each
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, expected, rtol=2 * eps, atol=8 * eps)


def assert_alike(ours, theirs, *inputs):
    """Forward and backward."""
    assert_near(ours(*inputs), theirs(*inputs))
    assert_same_gradients(ours, theirs, *inputs)


# ---- Llama


def llama_formula(xq, xk, freqs_cis):
    """Pairs as complex numbers, times freqs_cis."""
    arithmetic = torch.float64 if xq.dtype == torch.float64 else torch.float32
    results = []
    for x in (xq, xk):
        numbers = torch.view_as_complex(x.to(arithmetic).unflatten(-1, (-1, 2)))
        product = numbers * freqs_cis.unsqueeze(-2)
        results.append(torch.view_as_real(product).flatten(-2).to(x.dtype))
    return tuple(results)


@BY_DTYPE
def test_llama(dtype):
    of_llama_4 = pytest.importorskip("transformers.models.llama4.modeling_llama4").apply_rotary_emb
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = random(B, S, H, D, dtype=dtype), random(B, S, KH, D, dtype=dtype)
    for rows in ((), (1,), (B,)):
        angle = random(*rows, S, D // 2, dtype=real)
        freqs = torch.view_as_real(torch.polar(torch.full_like(angle, 1.25), angle))

        def called(function, freqs=freqs):
            return lambda q, k, f=freqs: function(q, k, torch.view_as_complex(f))

        ours, formula = called(llama.apply_rotary_emb), called(llama_formula)
        learned = (freqs,) if dtype in (torch.float64, torch.float32) else ()
        with naming(rows):
            assert_alike(ours, formula, *inputs, *learned)
            if rows and dtype != torch.float64:
                assert_alike(ours, called(of_llama_4), *inputs)


# ---- rotary-embedding-torch

UNCACHED = {"cache_if_possible": False}  # their cache has exactly dim channels
BHSD, BSHD = (B, H, S, D), (B, S, H, D)
LUCID = {  # options, shape, arguments of the call
    "lang": ({}, BHSD, {}),
    "part of the channels": ({"dim": 10}, BHSD, {}),
    "pixel": ({"freqs_for": "pixel", "max_freq": 7}, BHSD, {}),
    "constant": ({"freqs_for": "constant", "num_freqs": 3, **UNCACHED}, BHSD, {}),
    "custom": ({"custom_freqs": torch.tensor([0.5, 0.25]), **UNCACHED}, BHSD, {}),
    "other theta": ({"theta": 100, "theta_rescale_factor": 3.0}, BHSD, {}),
    "interpolated": ({"interpolate_factor": 2.0}, BHSD, {}),
    "from 30": ({}, BHSD, {"offset": 30}),
    "scaled": ({}, BHSD, {"scale": 0.5}),
    "tokens at -2": ({}, BHSD, {"seq_dim": -2}),
    "tokens at 2": ({}, BHSD, {"seq_dim": 2}),
    "without heads": ({}, (B, S, D), {}),
    "tokens alone": ({}, (S, D), {}),
    "tokens before heads": ({}, BSHD, {"seq_dim": -3}),
    "tokens before heads, no batch": ({}, (S, H, D), {"seq_dim": -3}),
    "tokens before heads, by the module": ({"seq_before_head_dim": True}, BSHD, {}),
}


def both(**options):
    """Their module and ours, with the same options."""
    libraries = rotary_embedding_torch, ours_of_lucid
    return [library.RotaryEmbedding(**{"dim": D, **options}) for library in libraries]


@BY_DTYPE
def test_rotary_embedding_torch(dtype):
    for name, (options, shape, call) in LUCID.items():
        theirs, ours = (module.rotate_queries_or_keys for module in both(**options))
        with naming(name):
            assert_alike(
                partial(ours, **call), partial(theirs, **call), random(*shape, dtype=dtype)
            )


def test_rotary_embedding_torch_learns_frequencies():
    t, weight = random(*BHSD), random(*BHSD, seed=1)
    for freqs_for in ("lang", "pixel", "constant"):
        modules = both(freqs_for=freqs_for, num_freqs=5, learned_freq=True)
        for module in modules:
            (module.rotate_queries_or_keys(t) * weight).sum().backward()
        theirs, ours = modules
        with naming(freqs_for):
            torch.testing.assert_close(ours.freqs.grad, theirs.freqs.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_rotary_embedding_torch_xpos(dtype):
    eps = torch.finfo(dtype).eps
    for name in (None, "xpos_scale_base", "interpolate_factor", "seq_before_head_dim"):
        theirs, ours = both(use_xpos=True, **({name: 4} if name else {}))
        tokens_first = name == "seq_before_head_dim"
        shape = BSHD if tokens_first else BHSD
        q, k = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
        with naming(name):
            if dtype == torch.float32:
                assert_alike(ours.rotate_queries_and_keys, theirs.rotate_queries_and_keys, q, k)
            else:  # they also round the scale and its positions to the dtype
                got, expected = (m.rotate_queries_and_keys(q, k) for m in (ours, theirs))
                torch.testing.assert_close(got, expected, rtol=8 * eps, atol=8 * eps)
            scale = ours.get_scale(torch.arange(S))
            theirs_of = scale[:, None] if tokens_first else scale
            assert_near(
                ours.rotate_queries_or_keys(q.float(), scale=scale),
                theirs.rotate_queries_or_keys(q.float(), scale=theirs_of),
            )


def test_rotary_embedding_torch_with_cached_keys():
    q, k = random(B, H, 3, D), random(*BHSD)
    expected, got = (module.rotate_queries_with_cached_keys(q, k, offset=2) for module in both())
    assert_near(got, expected)


def test_rotary_embedding_torch_checkpoints_and_casts():
    theirs, ours = both(learned_freq=True)
    torch.nn.init.uniform_(theirs.freqs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(ours.freqs, theirs.freqs)
    assert ours.bfloat16().freqs.dtype == torch.bfloat16  # a trained parameter
    _, fixed = both()
    freqs = fixed.freqs.clone()
    assert_same_bits(fixed.bfloat16().freqs, freqs)


def test_rotary_embedding_torch_positions_are_exact_in_bfloat16():
    _, ours = both()
    t = random(1, 1, 5, D, dtype=torch.bfloat16)
    angles = (torch.arange(5) + 1000)[:, None] * ours.freqs.double()
    expected = rounded_once(t.transpose(1, 2), angles.cos(), angles.sin(), interleaved=True)
    assert_near(ours.rotate_queries_or_keys(t, offset=1000), expected.transpose(1, 2))


# ---- ONNX


def by_onnxruntime(inputs, **attributes):
    types = {np.float32: onnx.TensorProto.FLOAT, np.float16: onnx.TensorProto.FLOAT16}
    types[np.int64] = onnx.TensorProto.INT64
    helper = onnx.helper
    values = {name: x.numpy() for name, x in inputs.items() if x is not None}
    names = [name if name in values else "" for name in inputs]
    node = helper.make_node("RotaryEmbedding", names, ["Y"], **attributes)
    of = {name: types[x.dtype.type] for name, x in values.items()}
    graph = helper.make_graph(
        [node],
        "rotary",
        [helper.make_tensor_value_info(name, of[name], x.shape) for name, x in values.items()],
        [helper.make_tensor_value_info("Y", of["X"], None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, values)
    return torch.from_numpy(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_onnx(dtype):
    eps = torch.finfo(dtype).eps
    for shape, channels, with_positions, interleaved in product(
        (BHSD, (B, S, H * D)), (D, 6), (True, False), (False, True)
    ):
        attributes = {"interleaved": int(interleaved), "num_heads": H}
        attributes |= {"rotary_embedding_dim": channels} if channels < D else {}
        rows = (L,) if with_positions else (B, S)
        x, table = random(*shape, dtype=dtype), random_table(*rows, channels // 2, dtype=dtype)
        at = random_positions(B, S, rows=L) if with_positions else None
        if shape == BHSD and channels == D:
            del attributes["num_heads"]  # onnxruntime requires it for parts of 4D

        def ours(x, cos, sin, at=at, attributes=attributes):
            return ours_of_onnx.rotary_embedding(x, cos, sin, at, **attributes)

        def formula(x, cos, sin, at=at, dim=channels, interleaved=interleaved):
            heads = x.unflatten(-1, (H, D)) if x.dim() == 3 else x.transpose(1, 2)
            options = {"rotary_dim": dim, "interleaved": interleaved}
            y = reference.apply_rotary(heads, cos, sin, at, **options)
            return y.flatten(2) if x.dim() == 3 else y.transpose(1, 2)

        with naming((shape, channels, with_positions, interleaved)):
            # float16: onnxruntime rounds the products and the sum
            inputs = {"X": x, "cos_cache": table[0], "sin_cache": table[1], "position_ids": at}
            got, expected = ours(x, *table), by_onnxruntime(inputs, **attributes)
            torch.testing.assert_close(got, expected, rtol=2 * eps, atol=4 * eps)
            assert_same_gradients(ours, formula, *(t.double() for t in (x, *table)))


# ---- torch.nn.functional

ROWS = ((S, 8), (1, S, 8), (1, 1, S, 8), (B, 1, S, 8), (1, 8), (8,))  # of D / 2 angles: broadcast


@BY_DTYPE
def test_torch_functional_with_rows_that_broadcast(dtype):
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, interleaved in product(ROWS, (False, True)):
        x, table = random(*BHSD, dtype=dtype), random_table(*rows, dtype=dtype)

        def formula(x, cos, sin, interleaved=interleaved):
            x, cos, sin = (t.to(arithmetic) for t in (x, cos, sin))
            x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
            y = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
            return (torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)).to(dtype)

        ours = partial(torch_functional.rotary_embedding, interleaved=interleaved)
        with naming((rows, interleaved)):
            assert_same_bits(ours(x, *table), formula(x, *table))
            if dtype == torch.float64:
                assert_same_gradients(ours, formula, x, *table)


def test_torch_functional_with_positions():
    x, table = random(*BHSD), random_table(L, D // 2)
    for batch, interleaved in product((1, B), (False, True)):
        position_ids = random_positions(batch, S, rows=L)
        got = torch_functional.rotary_embedding(x, *table, position_ids, interleaved=interleaved)
        rows = (t[position_ids].unsqueeze(1) for t in table)
        expected = torch_functional.rotary_embedding(x, *rows, interleaved=interleaved)
        with naming((batch, interleaved)):
            assert_same_bits(got, expected)


# ---- all functions

# fmt: off
X, T, PACKED = random(B, S, H, D), random(*BHSD), random(3 * S, H, D)
K, QKV, GROUPED = random(B, S, KH, D), random(B, S, 3, H, D), random(B, S, H + 2 * KH, D)
TABLE, ANGLES = random_table(L, D // 2), random(L, 1, 1, D // 2)
ROWS_OF_TOKENS = random_table(B, S, D // 2)
OFFSETS, AT = torch.tensor([4, 0, 9]), random_positions(B, S, rows=L)
CU_SEQLENS = torch.tensor([0, 5, 5, 26, 33], dtype=torch.int32)  # of the 33 tokens of PACKED
LUCID_MODULE = ours_of_lucid.RotaryEmbedding(D)
XPOS_MODULE = ours_of_lucid.RotaryEmbedding(D, use_xpos=True)
TUNE_MODULE = torchtune.RotaryPositionalEmbeddings(D)
EACH = {"seqlen_offsets": OFFSETS}
PACKED_EACH = {"cu_seqlens": CU_SEQLENS, "seqlen_offsets": torch.tensor([1, 2, 3, 4])}
BSHD_ENGINE = {"tensor_format": "bshd"}
OF_RANKS = {"tensor_format": "thd", "cu_seqlens": torch.tensor([0, 24, 64]),
            "start_positions": torch.tensor([3, 0]), "cp_size": 2, "cp_rank": 1}

flash, flash_qkv = flash_attention.apply_rotary_emb, flash_attention.apply_rotary_emb_qkv_
flash_kv, engine = flash_attention.apply_rotary_emb_kv_, transformer_engine.apply_rotary_pos_emb
of_llama, of_onnx = llama.apply_rotary_emb, ours_of_onnx.rotary_embedding
functional = torch_functional.rotary_embedding
lucid, cached = LUCID_MODULE.rotate_queries_or_keys, LUCID_MODULE.rotate_queries_with_cached_keys
xpos = XPOS_MODULE.rotate_queries_and_keys

CALLS = {  # each function, with each way to give positions
    "flash_attention": (flash, (X, *TABLE), {}),
    "flash_attention, offset": (flash, (X, *TABLE), {"seqlen_offsets": 3}),
    "flash_attention, offsets": (flash, (X, *TABLE), EACH),
    "flash_attention, packed": (flash, (PACKED, *TABLE), PACKED_EACH),
    "flash_attention, in place": (flash, (X, *TABLE), {"inplace": True}),
    "flash_attention, qkv": (flash_qkv, (QKV, *TABLE), {}),
    "flash_attention, qkv, offsets": (flash_qkv, (QKV, *TABLE), EACH),
    "flash_attention, two tables": (flash_qkv, (GROUPED, *TABLE, *TABLE), {"num_heads_q": H}),
    "flash_attention, kv": (flash_kv, (QKV[:, :, :2], *TABLE), {"seqlen_offsets": 3}),
    "transformer_engine": (engine, (X.transpose(0, 1), ANGLES), {}),
    "transformer_engine, at": (engine, (X, ANGLES), {**BSHD_ENGINE, "start_positions": OFFSETS}),
    "transformer_engine, ranks": (engine, (X[:, 1:], ANGLES), {**BSHD_ENGINE, "cp_size": 2}),
    "transformer_engine, packed, ranks": (engine, (PACKED[1:], ANGLES), OF_RANKS),
    "llama": (of_llama, (X, K, torch.complex(*ROWS_OF_TOKENS)), {}),
    "torchtune": (TUNE_MODULE, (X,), {}),
    "torchtune, positions": (TUNE_MODULE, (X,), {"input_pos": AT}),
    "rotary_embedding_torch": (lucid, (T,), {"offset": 4}),
    "rotary_embedding_torch, xpos": (xpos, (T, T), {}),
    "rotary_embedding_torch, cached": (cached, (T, T), {}),
    "onnx, positions": (of_onnx, (T, *TABLE, AT), {}),
    "onnx, rows": (of_onnx, (X.flatten(2), *ROWS_OF_TOKENS), {"num_heads": H}),
    "torch_functional, positions": (functional, (T, *TABLE, AT), {}),
    "torch_functional, rows": (functional, (T, *(r[:, None] for r in ROWS_OF_TOKENS)), {}),
}
# fmt: on


def test_nothing_of_the_size_of_x_is_made_but_the_result():
    for name, (function, args, options) in CALLS.items():
        with naming(name), torch.no_grad():
            args = [x.clone() for x in args]  # some are written
            function(*args, **options)  # fills caches
            with LargeTensors(B * S * KH * D) as large:
                function(*args, **options)
            assert all(by.startswith("rope.apply_rotary") for by in large.made_by), large.made_by


def test_nothing_waits_for_a_value_on_the_device():
    for name, (function, args, options) in CALLS.items():
        with naming(name), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, options = tree_map_only(torch.Tensor, mode.from_tensor, (args, options))
            function(*args, **options)  # raises if a value is read


def test_compiles_to_one_graph():
    for name, (function, args, options) in CALLS.items():
        expected = function(*(x.clone() for x in args), **options)
        torch.compiler.reset()
        compiled = torch.compile(partial(function, **options), backend="eager", fullgraph=True)
        with naming(name):
            results = compiled(*(x.clone() for x in args))
            for got, same in zip(tree_leaves(results), tree_leaves(expected), strict=True):
                assert_same_bits(got, same)


# fmt: off
ZEROS = torch.zeros(B, S, dtype=torch.int64)
BATCHED = [t[None] for t in TABLE]
NARROW = [t[:, :4] for t in TABLE]
COLUMNS_FIRST = TABLE[1].t().contiguous().t()
MANY = {"cu_seqlens": CU_SEQLENS}
TWO = {"num_heads_q": 2}
REFUSED = [  # function, arguments, options, message
    (flash, (X, *BATCHED), {},
     r"flash_attention.apply_rotary_emb: expected cos to have shape \[seqlen_ro, R / 2\], got sha"),
    (flash, (X[0], *TABLE), {}, r"x to have shape \[B, S, H, D\], got shape \[11, 4, 16\]"),
    (flash, (X, *TABLE), MANY, r"x to have shape \[T, H, D\] when cu_"),
    (flash, (X[0], *TABLE), {"cu_seqlens": CU_SEQLENS[None]}, r"cu_seqlens to have shape \[B \+ 1"),
    (flash, (X[0], *TABLE), {**MANY, "max_seqlen": 50}, r"cos to have rows for 50 tokens, got"),
    (flash, (X, *TABLE), {"seqlen_offsets": 30},
     "seqlen_offsets to be from 0 to 29, for 11 tokens and 40 rows of cos, got 30"),
    (flash, (X, *TABLE), {"seqlen_offsets": -1}, "seqlen_offsets to be from 0 to 29, .*, got -1"),
    (flash, (X, *TABLE), {"seqlen_offsets": OFFSETS[:2]}, r".*_offsets to be .* of shape \[3\]"),
    (flash_qkv, (QKV[:, :, :2], *TABLE), {},
     r"apply_rotary_emb_qkv_: expected qkv to have shape \[B, S, 3, H, D\], got shape \[3, 11, 2"),
    (flash_qkv, (X[0], *TABLE), {}, r"qkv to have shape \[B, S, 3, H, D\], or .*, got shape \[11"),
    (flash_qkv, (X, *TABLE), {}, r"num_heads_q to be given with qkv \[B, S, Hq \+ 2 Hk, D\], got"),
    (flash_qkv, (X, *TABLE), {"num_heads_q": 1},
     "num_heads_q to leave as many heads for k as for v, of the 4 of qkv, got 1"),
    (flash_qkv, (X, *TABLE), {**TWO, "sin_k": BATCHED[1]}, r"sin_k to have shape \[seqlen_ro, R"),
    (flash_qkv, (X, *TABLE), {**TWO, "cos_k": TABLE[0][1:]},
     r"cos_k to have the shape, dtype, device and last stride of cos, got \[39, 8\], "),
    (flash_qkv, (X, *TABLE), {**TWO, "sin_k": TABLE[1].double()}, r"sin_k .*, torch.float64, cpu"),
    (flash_qkv, (X, *TABLE), {**TWO, "sin_k": COLUMNS_FIRST}, r"sin_k .*, strides \(1, 40\)"),
    (flash_qkv, (X, *TABLE), {**TWO, "seqlen_offsets": 30},
     "qkv_: expected seqlen_offsets to be from 0 to 29, .*, got 30"),
    (flash_kv, (X, *TABLE), {}, r"emb_kv_: expected kv to have shape \[B, S, 2, H, D\]"),
    (of_llama, (X, X, TABLE[0]), {},
     "llama.apply_rotary_emb: expected freqs_cis to be complex64 or complex128, got torch.float"),
    (of_llama, (X, X, torch.complex(*TABLE)), {}, r"freqs_cis to have shape \[11, 8\] or \[1\|3, "),
    (of_llama, (X[0], X[0], torch.complex(*TABLE)), {}, r"xq to have shape \[B, S, H, D\]"),
    (TUNE_MODULE, (X[..., :8],), {},
     r"torchtune.RotaryPositionalEmbeddings: expected x to have shape \[B, S, H, 16\]"),
    (XPOS_MODULE.rotate_queries_or_keys, (T,), {}, "scale to be given with use_xpos"),
    (LUCID_MODULE.rotate_queries_and_keys, (T, T), {}, "use_xpos to be set, got False"),
    (XPOS_MODULE.rotate_queries_with_cached_keys, (T, T), {}, "use_xpos not to be set, got True"),
    (cached, (T, T[:, :, 1:]), {}, "k to have at least the 11 tokens of q"),
    (xpos, (T, T[:, :, 1:]), {}, "k to have the 11 tokens of q"),
    (lucid, (T, 0), {}, "seq_dim to be the last dimension but one or two, got 0"),
    (lucid, (T[None],), {}, r"t to have 2 to 4 dimensions, got shape \[1, 3, 4, 11, 16\]"),
    (lucid, (T,), {"offset": 0.5}, "offset to be an int, got 0.5"),
    (ours_of_lucid.RotaryEmbedding, (D,), {"freqs_for": "word"}, "freqs_for .*, got 'word'"),
    (ours_of_lucid.RotaryEmbedding, (D,), {"interpolate_factor": 0.5}, ".*_factor .*, got 0.5"),
    (of_onnx, (X[0, 0], *TABLE), {},
     r"onnx.rotary_embedding: expected X to have shape \[B, H, S, D\] or \[B, S, H D\]"),
    (of_onnx, (X.flatten(2), *TABLE), {"num_heads": 5}, r"num_heads to divide the 64 ch.* got 5"),
    (of_onnx, (X.flatten(2), *TABLE), {}, "num_heads to divide the 64 channels of X .*, got 0"),
    (of_onnx, (T, *TABLE), {}, r"cos_cache to have shape \[B, S, 8\] without position_ids"),
    (of_onnx, (T, *TABLE, ZEROS), {"rotary_embedding_dim": 6},
     r"cos_cache to have shape \[max_position_id_plus_1, 3\] with position_ids"),
    (functional, (T[0], *TABLE), {},
     r"torch_functional.rotary_embedding: expected x to have shape \[B, H, S, D\]"),
    (functional, (T, *TABLE), {}, r"cos to have shape \[11, 8\] or \[1\|3, 1, 11, 8\], got shape"),
    (functional, (T, TABLE[0][:S], TABLE[1][:S].expand(H, S, 8)), {}, r"sin .* \[4, 11, 8"),
    (functional, (T, *NARROW, ZEROS), {}, r"cos to have shape \[N, 8\] with position_ids"),
    (functional, (T, *TABLE, OFFSETS), {}, r"position_ids to have shape \[3, 11\], got shape \[3"),
]
# fmt: on


def test_refusals_name_function_argument_expected_and_got():
    for function, args, options, message in REFUSED:
        expected = message if "expected" in message else f"expected {message}"
        with naming(message), pytest.raises(ValueError, match=f"^rope_ext .*{expected}"):
            function(*args, **options)


def test_argument_of_another_type_is_named():
    for name, (function, args, options) in CALLS.items():
        parameters = list(inspect.signature(function).parameters)
        if isinstance(function, torch.nn.Module):
            parameters = list(inspect.signature(function.forward).parameters)
        for place, parameter in enumerate(parameters[: len(args)]):
            for other, shown in ((None, "None"), ([1.0], "a list of 1.*"), (2.5, "2.5")):
                given = [*args[:place], other, *args[place + 1 :]]
                if other is None and parameter in ("cos_k", "sin_k", "position_ids"):
                    continue
                kind = r"a Tensor( or None)?, got "
                expected = rf"rope_ext \w+\.\w+: expected {parameter} to be {kind}{shown}$"
                with naming((name, parameter, other)), pytest.raises(TypeError, match=expected):
                    function(*given, **options)
    with pytest.raises(TypeError, match=r"apply_rotary_emb\(\) missing 1 .* argument: 'sin'"):
        flash(X, TABLE[0])
