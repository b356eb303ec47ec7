"""Other libraries' signatures on the operators, compared to the library if it runs on a CPU, else
to its documented formula. flash-attention and Transformer Engine have their own files, and are part
of the last section here.
"""

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
    random,
    random_positions,
    random_table,
)
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from rope_ext import reference
from rope_ext.integrations.reference_apis import (
    flash_attention,
    llama,
    torch_functional,
    torchtune,
    transformer_engine,
)
from rope_ext.integrations.reference_apis import onnx as ours_of_onnx
from rope_ext.integrations.reference_apis import (
    rotary_embedding_torch as ours_of_rotary_embedding_torch,
)

B, S, H, KH, D, L = 3, 11, 4, 2, 16, 40

BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def assert_near(got, expected):
    """Of the same shape and dtype, and within torch.testing's tolerance for it, a few roundings.

    For float64 the tolerance is that of float32: the libraries compute their tables in float32, as
    we do for float32 frequencies.
    """
    assert got.dtype == expected.dtype
    low = {"rtol": 1.3e-6, "atol": 1e-5} if got.dtype == torch.float64 else {}
    torch.testing.assert_close(got, expected, **low)


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
@pytest.mark.parametrize("rows", [(), (1,), (B,)], ids=["all", "1", "each"])
def test_llama(rows, dtype):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    xq, xk = random(B, S, H, D, dtype=dtype), random(B, S, KH, D, dtype=dtype)
    angle = random(*rows, S, D // 2, dtype=real)
    freqs_cis = torch.polar(torch.full_like(angle, 1.25), angle)
    results = llama.apply_rotary_emb(xq, xk, freqs_cis)
    for got, expected in zip(results, llama_formula(xq, xk, freqs_cis), strict=True):
        assert_near(got, expected)
    if dtype in (torch.float64, torch.float32):
        inputs = (xq, xk, torch.view_as_real(freqs_cis))
        assert_same_gradients(
            lambda q, k, f: llama.apply_rotary_emb(q, k, torch.view_as_complex(f)),
            lambda q, k, f: llama_formula(q, k, torch.view_as_complex(f)),
            *inputs,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("batch", [1, B])
def test_llama_beside_the_function_of_llama_4(batch, dtype):
    theirs = pytest.importorskip("transformers.models.llama4.modeling_llama4").apply_rotary_emb
    inputs = random(B, S, H, D, dtype=dtype), random(B, S, KH, D, dtype=dtype)
    angle = random(batch, S, D // 2)
    freqs_cis = torch.polar(torch.full_like(angle, 1.25), angle)
    for got, expected in zip(
        llama.apply_rotary_emb(*inputs, freqs_cis), theirs(*inputs, freqs_cis), strict=True
    ):
        assert_near(got, expected)
    assert_same_gradients(
        lambda q, k: llama.apply_rotary_emb(q, k, freqs_cis),
        lambda q, k: theirs(q, k, freqs_cis),
        *inputs,
    )


# ---- torchtune: its own module is in test_torchtune.py


@BY_DTYPE
def test_torchtune(dtype):
    module = torchtune.RotaryPositionalEmbeddings(D, max_seq_len=L, base=500)
    x = random(B, S, H, D, dtype=dtype)
    frequency = 1.0 / 500 ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    positions = random_positions(B, S, rows=L)
    for input_pos in (None, positions, positions[0], positions[:1].int()):
        at = torch.arange(S) if input_pos is None else input_pos
        table = reference.cos_sin(frequency, at if at.dim() == 2 else at[None])
        expected = reference.apply_rotary(x.double(), *table, interleaved=True).to(dtype)
        assert_near(module(x, input_pos=input_pos), expected)
        assert_same_gradients(
            lambda x, input_pos=input_pos: module(x, input_pos=input_pos),
            lambda x, table=table: reference.apply_rotary(x.double(), *table, interleaved=True).to(
                dtype
            ),
            x,
        )


def test_torchtune_frequencies_survive_casts_and_come_back_from_meta():
    module = torchtune.RotaryPositionalEmbeddings(D)
    inv_freq = module.inv_freq.clone()
    assert not module.state_dict()
    assert_same_bits(module.bfloat16().inv_freq, inv_freq)
    module.to("meta").to_empty(device="cpu").rope_init()
    assert_same_bits(module.inv_freq, inv_freq)
    x = random(1, S, H, D)
    assert module(x, input_pos=torch.tensor([10**6] * S)).isfinite().all()


# ---- rotary-embedding-torch

UNCACHED = {"cache_if_possible": False}  # their cache has exactly dim channels

LUCID = {
    "lang": ({"dim": D}, {}),
    "part of the channels": ({"dim": 10}, {}),
    "pixel": ({"dim": D, "freqs_for": "pixel", "max_freq": 7}, {}),
    "constant": ({"dim": D, "freqs_for": "constant", "num_freqs": 3, **UNCACHED}, {}),
    "custom": ({"dim": D, "custom_freqs": torch.tensor([0.5, 0.25]), **UNCACHED}, {}),
    "other theta": ({"dim": D, "theta": 100, "theta_rescale_factor": 3.0}, {}),
    "interpolated": ({"dim": D, "interpolate_factor": 2.0}, {}),
    "from 30": ({"dim": D}, {"offset": 30}),
    "scaled": ({"dim": D}, {"scale": 0.5}),
}


def both(options):
    """Their module and ours, with the same options."""
    theirs = rotary_embedding_torch.RotaryEmbedding(**options)
    return theirs, ours_of_rotary_embedding_torch.RotaryEmbedding(**options)


@BY_DTYPE
@pytest.mark.parametrize("case", LUCID)
def test_rotary_embedding_torch(case, dtype):
    options, call = LUCID[case]
    theirs, ours = both(options)
    t = random(B, H, S, D, dtype=dtype)
    assert_near(ours.rotate_queries_or_keys(t, **call), theirs.rotate_queries_or_keys(t, **call))
    assert_same_gradients(
        lambda t: ours.rotate_queries_or_keys(t, **call),
        lambda t: theirs.rotate_queries_or_keys(t, **call),
        t,
    )


@pytest.mark.parametrize(
    ("shape", "seq_dim"),
    [
        ((B, H, S, D), None),
        ((B, H, S, D), -2),
        ((B, H, S, D), 2),
        ((B, S, D), None),
        ((S, D), None),
        ((B, S, H, D), -3),
        ((S, H, D), -3),
    ],
)
def test_rotary_embedding_torch_takes_tokens_in_either_dimension(shape, seq_dim):
    theirs, ours = both({"dim": D})
    t = random(*shape)
    assert_near(ours.rotate_queries_or_keys(t, seq_dim), theirs.rotate_queries_or_keys(t, seq_dim))


def test_rotary_embedding_torch_with_tokens_before_heads():
    theirs, ours = both({"dim": D, "seq_before_head_dim": True})
    t = random(B, S, H, D)
    assert_near(ours.rotate_queries_or_keys(t), theirs.rotate_queries_or_keys(t))


@pytest.mark.parametrize("freqs_for", ["lang", "pixel", "constant"])
def test_rotary_embedding_torch_learns_frequencies(freqs_for):
    modules = both({"dim": D, "freqs_for": freqs_for, "num_freqs": 5, "learned_freq": True})
    t, weight = random(B, H, S, D), random(B, H, S, D, seed=1)
    for module in modules:
        (module.rotate_queries_or_keys(t) * weight).sum().backward()
    theirs, ours = modules
    torch.testing.assert_close(ours.freqs.grad, theirs.freqs.grad, rtol=1e-4, atol=1e-3)


@BY_DTYPE
@pytest.mark.parametrize(
    "options",
    [{}, {"xpos_scale_base": 64}, {"interpolate_factor": 4.0}, {"seq_before_head_dim": True}],
    ids=str,
)
def test_rotary_embedding_torch_xpos(options, dtype):
    theirs, ours = both({"dim": D, "use_xpos": True, **options})
    shape = (B, S, H, D) if "seq_before_head_dim" in options else (B, H, S, D)
    q, k = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    results = ours.rotate_queries_and_keys(q, k)
    expected = theirs.rotate_queries_and_keys(q, k)
    exact = dtype in (torch.float64, torch.float32)
    for got, same in zip(results, expected, strict=True):
        if exact:
            assert_near(got, same)
        else:  # they also round the scale and its positions to the dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got, same, rtol=8 * eps, atol=8 * eps)
    if exact:
        assert_same_gradients(ours.rotate_queries_and_keys, theirs.rotate_queries_and_keys, q, k)
    scale = ours.get_scale(torch.arange(S))
    assert_near(
        ours.rotate_queries_or_keys(q.float(), scale=scale),
        theirs.rotate_queries_or_keys(q.float(), scale=scale)
        if "seq_before_head_dim" not in options
        else theirs.rotate_queries_or_keys(q.float(), scale=scale[:, None]),
    )


def test_rotary_embedding_torch_with_cached_keys():
    theirs, ours = both({"dim": D})
    q, k = random(B, H, 3, D), random(B, H, S, D)
    results = ours.rotate_queries_with_cached_keys(q, k, offset=2)
    expected = theirs.rotate_queries_with_cached_keys(q, k, offset=2)
    for got, same in zip(results, expected, strict=True):
        assert_near(got, same)


def test_rotary_embedding_torch_checkpoints_and_casts():
    theirs, ours = both({"dim": D, "learned_freq": True})
    torch.nn.init.uniform_(theirs.freqs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(ours.freqs, theirs.freqs)
    assert ours.bfloat16().freqs.dtype == torch.bfloat16  # a trained parameter
    _, fixed = both({"dim": D})
    freqs = fixed.freqs.clone()
    assert_same_bits(fixed.bfloat16().freqs, freqs)


def test_rotary_embedding_torch_positions_are_exact_in_bfloat16():
    _, ours = both({"dim": D})
    t = random(1, 1, 5, D, dtype=torch.bfloat16)
    angles = (torch.arange(5) + 1000)[:, None] * ours.freqs.double()
    expected = reference.apply_rotary(
        t.double().transpose(1, 2), angles.cos(), angles.sin(), interleaved=True
    )
    assert_near(
        ours.rotate_queries_or_keys(t, offset=1000), expected.transpose(1, 2).to(torch.bfloat16)
    )


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


ONNX = {
    "4D": ((B, H, S, D), {}),
    "4D, part of the channels": ((B, H, S, D), {"rotary_embedding_dim": 6}),
    "3D": ((B, S, H * D), {"num_heads": H}),
    "3D, part of the channels": ((B, S, H * D), {"num_heads": H, "rotary_embedding_dim": 6}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@PAIRS
@pytest.mark.parametrize("with_positions", [True, False], ids=["positions", "rows"])
@pytest.mark.parametrize("case", ONNX)
def test_onnx(case, with_positions, interleaved, dtype):
    shape, attributes = ONNX[case]
    attributes = {"interleaved": int(interleaved), **attributes}
    width = attributes.get("rotary_embedding_dim", D) // 2
    rows = (L,) if with_positions else (B, S)
    cos, sin = random_table(*rows, width, dtype=dtype)
    position_ids = random_positions(B, S, rows=L) if with_positions else None
    x = random(*shape, dtype=dtype)
    inputs = {"X": x, "cos_cache": cos, "sin_cache": sin, "position_ids": position_ids}
    if "part" in case and len(shape) == 4:
        attributes["num_heads"] = H  # onnxruntime requires it here; the standard does not
    got = ours_of_onnx.rotary_embedding(**inputs, **attributes)
    expected = by_onnxruntime(inputs, **attributes)
    # float16: onnxruntime rounds the products and the sum
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=2 * eps, atol=4 * eps)

    def formula(x, cos, sin):
        heads = x.unflatten(-1, (H, D)) if x.dim() == 3 else x.transpose(1, 2)
        y = reference.apply_rotary(
            heads, cos, sin, position_ids, rotary_dim=2 * width, interleaved=interleaved
        )
        return y.flatten(2) if x.dim() == 3 else y.transpose(1, 2)

    assert_same_gradients(
        lambda x, cos, sin: ours_of_onnx.rotary_embedding(x, cos, sin, position_ids, **attributes),
        formula,
        *(t.double() for t in (x, cos, sin)),
    )


# ---- torch.nn.functional


@BY_DTYPE
@PAIRS
@pytest.mark.parametrize(
    "rows",
    [(S, D // 2), (1, S, D // 2), (1, 1, S, D // 2), (B, 1, S, D // 2), (1, D // 2), (D // 2,)],
    ids=str,
)
def test_torch_functional_with_rows_that_broadcast(rows, interleaved, dtype):
    x, table = random(B, H, S, D, dtype=dtype), random_table(*rows, dtype=dtype)

    def formula(x, cos, sin):
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        x, cos, sin = (t.to(arithmetic) for t in (x, cos, sin))
        x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        y = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        y = torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)
        return y.to(dtype)

    def ours(*args):
        return torch_functional.rotary_embedding(*args, interleaved=interleaved)

    assert_same_bits(ours(x, *table), formula(x, *table))
    if dtype == torch.float64:
        assert_same_gradients(ours, formula, x, *table)


@PAIRS
@pytest.mark.parametrize("batch", [1, B])
def test_torch_functional_with_positions(batch, interleaved):
    x, table = random(B, H, S, D), random_table(L, D // 2)
    position_ids = random_positions(batch, S, rows=L)
    got = torch_functional.rotary_embedding(x, *table, position_ids, interleaved=interleaved)
    rows = (t[position_ids].unsqueeze(1) for t in table)
    assert_same_bits(got, torch_functional.rotary_embedding(x, *rows, interleaved=interleaved))


# ---- all functions


def calls():
    """One call of each function, for each way to give positions."""
    x, t, packed = random(B, S, H, D), random(B, H, S, D), random(3 * S, H, D)
    k = random(B, S, KH, D)
    table = random_table(L, D // 2)
    rows = random_table(B, S, D // 2)
    at = random_positions(B, S, rows=L)
    lucid = ours_of_rotary_embedding_torch.RotaryEmbedding(D)
    xpos = ours_of_rotary_embedding_torch.RotaryEmbedding(D, use_xpos=True)
    tune = torchtune.RotaryPositionalEmbeddings(D)
    offsets = torch.tensor([4, 0, 9])
    options = {"cu_seqlens": CU_SEQLENS, "seqlen_offsets": torch.tensor([1, 2, 3, 4])}
    flash = flash_attention.apply_rotary_emb
    qkv, grouped = random(B, S, 3, H, D), random(B, S, H + 2 * KH, D)
    flash_qkv = flash_attention.apply_rotary_emb_qkv_
    flash_kv = flash_attention.apply_rotary_emb_kv_
    engine, angles = transformer_engine.apply_rotary_pos_emb, random(L, 1, 1, D // 2)
    bshd = {"tensor_format": "bshd"}
    from_offsets = {**bshd, "start_positions": offsets}
    of_ranks = {
        "tensor_format": "thd",
        "cu_seqlens": torch.tensor([0, 24, 64]),
        "start_positions": torch.tensor([3, 0]),
        "cp_size": 2,
        "cp_rank": 1,
    }
    onnx_ = ours_of_onnx.rotary_embedding
    return {
        "flash_attention": (flash, (x, *table), {}),
        "flash_attention, offset": (flash, (x, *table), {"seqlen_offsets": 3}),
        "flash_attention, offsets": (flash, (x, *table), {"seqlen_offsets": offsets}),
        "flash_attention, packed": (flash, (packed, *table), options),
        "flash_attention, in place": (flash, (x, *table), {"inplace": True}),
        "flash_attention, qkv": (flash_qkv, (qkv, *table), {}),
        "flash_attention, qkv, offsets": (flash_qkv, (qkv, *table), {"seqlen_offsets": offsets}),
        "flash_attention, grouped, two tables": (
            flash_qkv,
            (grouped, *table, *table),
            {"num_heads_q": H},
        ),
        "flash_attention, kv": (flash_kv, (qkv[:, :, :2], *table), {"seqlen_offsets": 3}),
        "transformer_engine": (engine, (x.transpose(0, 1), angles), {}),
        "transformer_engine, positions": (engine, (x, angles), from_offsets),
        "transformer_engine, ranks": (engine, (x[:, 1:], angles), {**bshd, "cp_size": 2}),
        "transformer_engine, packed, ranks": (engine, (packed[1:], angles), of_ranks),
        "llama": (llama.apply_rotary_emb, (x, k, torch.complex(*rows)), {}),
        "torchtune": (tune, (x,), {}),
        "torchtune, positions": (tune, (x,), {"input_pos": at}),
        "rotary_embedding_torch": (lucid.rotate_queries_or_keys, (t,), {"offset": 4}),
        "rotary_embedding_torch, xpos": (xpos.rotate_queries_and_keys, (t, t), {}),
        "rotary_embedding_torch, cached": (lucid.rotate_queries_with_cached_keys, (t, t), {}),
        "onnx, positions": (onnx_, (t, *table, at), {}),
        "onnx, rows": (onnx_, (x.flatten(2), *rows), {"num_heads": H}),
        "torch_functional, positions": (torch_functional.rotary_embedding, (t, *table, at), {}),
        "torch_functional, rows": (
            torch_functional.rotary_embedding,
            (t, *(r[:, None] for r in rows)),
            {},
        ),
    }


CU_SEQLENS = torch.tensor([0, 5, 5, 26, 33], dtype=torch.int32)  # of the 33 tokens of calls()
CALLS = pytest.mark.parametrize("call", calls())


@CALLS
def test_nothing_of_the_size_of_x_is_made_but_the_result(call):
    function, args, options = calls()[call]
    with torch.no_grad():
        function(*args, **options)  # fills caches
        with LargeTensors(B * S * KH * D) as large:
            function(*args, **options)
    assert all(name.startswith("rope.apply_rotary") for name in large.made_by), large.made_by


@CALLS
def test_nothing_waits_for_a_value_on_the_device(call):
    function, args, options = calls()[call]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in args]
        options = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for name, x in options.items()
        }
        function(*fake, **options)  # raises if a value is read


@CALLS
def test_compiles_to_one_graph(call):
    function, args, options = calls()[call]
    expected = function(*(x.clone() for x in args), **options)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: function(*args, **options), backend="aot_eager", fullgraph=True
    )
    for got, same in zip(tree_leaves(compiled(*args)), tree_leaves(expected), strict=True):
        assert_same_bits(got, same)


X, T = random(B, S, H, D), random(B, H, S, D)
TABLE = random_table(L, D // 2)
OFFSETS = torch.zeros(B, dtype=torch.int64)
LUCID_MODULE = ours_of_rotary_embedding_torch.RotaryEmbedding(D)
XPOS_MODULE = ours_of_rotary_embedding_torch.RotaryEmbedding(D, use_xpos=True)
TUNE_MODULE = torchtune.RotaryPositionalEmbeddings(D)

REFUSED = {
    r"flash_attention.apply_rotary_emb: expected cos to have shape \[seqlen_ro, R / 2\], got "
    r"shape \[1, 40, 8\]": lambda: flash_attention.apply_rotary_emb(X, *(t[None] for t in TABLE)),
    r"expected x to have shape \[B, S, H, D\], got shape \[11, 4, 16\]": (
        lambda: flash_attention.apply_rotary_emb(X[0], *TABLE)
    ),
    r"expected x to have shape \[T, H, D\] when cu_seqlens is given": (
        lambda: flash_attention.apply_rotary_emb(X, *TABLE, cu_seqlens=CU_SEQLENS)
    ),
    r"expected cu_seqlens to have shape \[B \+ 1\]": (
        lambda: flash_attention.apply_rotary_emb(X[0], *TABLE, cu_seqlens=CU_SEQLENS[None])
    ),
    r"expected cos to have rows for 50 tokens, got shape \[40, 8\]": (
        lambda: flash_attention.apply_rotary_emb(X[0], *TABLE, cu_seqlens=CU_SEQLENS, max_seqlen=50)
    ),
    r"expected seqlen_offsets to be from 0 to 29, for 11 tokens and 40 rows of cos, got 30": (
        lambda: flash_attention.apply_rotary_emb(X, *TABLE, seqlen_offsets=30)
    ),
    r"expected seqlen_offsets to be from 0 to 29, .*, got -1": (
        lambda: flash_attention.apply_rotary_emb(X, *TABLE, seqlen_offsets=-1)
    ),
    r"expected seqlen_offsets to be an int or of shape \[3\], got shape \[2\]": (
        lambda: flash_attention.apply_rotary_emb(X, *TABLE, seqlen_offsets=OFFSETS[:2])
    ),
    r"apply_rotary_emb_qkv_: expected qkv to have shape \[B, S, 3, H, D\], got shape \[3, 11, 2,": (
        lambda: flash_attention.apply_rotary_emb_qkv_(X[:, :, None].expand(B, S, 2, H, D), *TABLE)
    ),
    r"expected qkv to have shape \[B, S, 3, H, D\], or .*, got shape \[11, 4, 16\]": (
        lambda: flash_attention.apply_rotary_emb_qkv_(X[0], *TABLE)
    ),
    r"expected num_heads_q to be given with qkv \[B, S, Hq \+ 2 Hk, D\], got None": (
        lambda: flash_attention.apply_rotary_emb_qkv_(X, *TABLE)
    ),
    r"expected num_heads_q to leave as many heads for k as for v, of the 4 of qkv, got 1": (
        lambda: flash_attention.apply_rotary_emb_qkv_(X, *TABLE, num_heads_q=1)
    ),
    r"expected sin_k to have shape \[seqlen_ro, R / 2\], got shape \[1, 40, 8\]": (
        lambda: flash_attention.apply_rotary_emb_qkv_(
            X, *TABLE, sin_k=TABLE[1][None], num_heads_q=2
        )
    ),
    r"expected cos_k to have the shape, dtype, device and last stride of cos, got \[39, 8\], .*": (
        lambda: flash_attention.apply_rotary_emb_qkv_(X, *TABLE, cos_k=TABLE[0][1:], num_heads_q=2)
    ),
    r"expected sin_k to have the shape, dtype, .*, got \[40, 8\], torch.float64, cpu, .*": (
        lambda: flash_attention.apply_rotary_emb_qkv_(
            X, *TABLE, sin_k=TABLE[1].double(), num_heads_q=2
        )
    ),
    r"expected sin_k to have the shape, .* last stride of cos, got .*, strides \(1, 40\)": (
        lambda: flash_attention.apply_rotary_emb_qkv_(
            X, *TABLE, sin_k=TABLE[1].t().contiguous().t(), num_heads_q=2
        )
    ),
    r"apply_rotary_emb_qkv_: expected seqlen_offsets to be from 0 to 29, .*, got 30": (
        lambda: flash_attention.apply_rotary_emb_qkv_(X, *TABLE, num_heads_q=2, seqlen_offsets=30)
    ),
    r"apply_rotary_emb_kv_: expected kv to have shape \[B, S, 2, H, D\]": (
        lambda: flash_attention.apply_rotary_emb_kv_(X, *TABLE)
    ),
    r"llama.apply_rotary_emb: expected freqs_cis to be complex64 or complex128, got torch.float": (
        lambda: llama.apply_rotary_emb(X, X, TABLE[0])
    ),
    r"expected freqs_cis to have shape \[11, 8\] or \[1\|3, 11, 8\], got shape \[40, 8\]": (
        lambda: llama.apply_rotary_emb(X, X, torch.complex(*TABLE))
    ),
    r"expected xq to have shape \[B, S, H, D\]": (
        lambda: llama.apply_rotary_emb(X[0], X[0], torch.complex(*TABLE))
    ),
    r"torchtune.RotaryPositionalEmbeddings: expected x to have shape \[B, S, H, 16\]": (
        lambda: TUNE_MODULE(X[..., :8])
    ),
    r"expected scale to be given with use_xpos": lambda: XPOS_MODULE.rotate_queries_or_keys(T),
    r"expected use_xpos to be set, got False": lambda: LUCID_MODULE.rotate_queries_and_keys(T, T),
    r"expected use_xpos not to be set, got True": (
        lambda: XPOS_MODULE.rotate_queries_with_cached_keys(T, T)
    ),
    r"expected k to have at least the 11 tokens of q": (
        lambda: LUCID_MODULE.rotate_queries_with_cached_keys(T, T[:, :, 1:])
    ),
    r"expected k to have the 11 tokens of q": (
        lambda: XPOS_MODULE.rotate_queries_and_keys(T, T[:, :, 1:])
    ),
    r"expected seq_dim to be the last dimension but one or two, got 0": (
        lambda: LUCID_MODULE.rotate_queries_or_keys(T, 0)
    ),
    r"expected t to have 2 to 4 dimensions, got shape \[1, 3, 4, 11, 16\]": (
        lambda: LUCID_MODULE.rotate_queries_or_keys(T[None])
    ),
    r"expected offset to be an int, got 0.5": (
        lambda: LUCID_MODULE.rotate_queries_or_keys(T, offset=0.5)
    ),
    r"expected freqs_for to be lang, pixel or constant, got 'word'": (
        lambda: ours_of_rotary_embedding_torch.RotaryEmbedding(D, freqs_for="word")
    ),
    r"expected interpolate_factor to be at least 1, got 0.5": (
        lambda: ours_of_rotary_embedding_torch.RotaryEmbedding(D, interpolate_factor=0.5)
    ),
    r"onnx.rotary_embedding: expected X to have shape \[B, H, S, D\] or \[B, S, H D\]": (
        lambda: ours_of_onnx.rotary_embedding(X[0, 0], *TABLE)
    ),
    r"expected num_heads to divide the 64 channels of X \[B, S, H D\], got 5": (
        lambda: ours_of_onnx.rotary_embedding(X.flatten(2), *TABLE, num_heads=5)
    ),
    r"expected num_heads to divide the 64 channels of X \[B, S, H D\], got 0": (
        lambda: ours_of_onnx.rotary_embedding(X.flatten(2), *TABLE)
    ),
    r"expected cos_cache to have shape \[B, S, 8\] without position_ids, got shape \[40, 8\]": (
        lambda: ours_of_onnx.rotary_embedding(T, *TABLE)
    ),
    r"expected cos_cache to have shape \[max_position_id_plus_1, 3\] with position_ids": (
        lambda: ours_of_onnx.rotary_embedding(
            T, *TABLE, OFFSETS[:, None].expand(B, S), rotary_embedding_dim=6
        )
    ),
    r"torch_functional.rotary_embedding: expected x to have shape \[B, H, S, D\]": (
        lambda: torch_functional.rotary_embedding(T[0], *TABLE)
    ),
    r"expected cos to have shape \[11, 8\] or \[1\|3, 1, 11, 8\], got shape \[40, 8\]": (
        lambda: torch_functional.rotary_embedding(T, *TABLE)
    ),
    r"expected sin to have shape .*, got shape \[4, 11, 8\]": (
        lambda: torch_functional.rotary_embedding(T, TABLE[0][:S], TABLE[1][:S].expand(H, S, 8))
    ),
    r"expected cos to have shape \[N, 8\] with position_ids, got shape \[40, 4\]": (
        lambda: torch_functional.rotary_embedding(
            T, *(t[:, :4] for t in TABLE), OFFSETS[:, None].expand(B, S)
        )
    ),
    r"expected position_ids to have shape \[3, 11\], got shape \[3\]": (
        lambda: torch_functional.rotary_embedding(T, *TABLE, OFFSETS)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_function_argument_expected_and_got(message):
    with pytest.raises(ValueError, match=f"^rope_ext .*{message}"):
        REFUSED[message]()
