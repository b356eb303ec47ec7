"""RotaryEmbedding: its results, its table, and the effect of casts, copies and state dicts."""

import copy
import pickle

import pytest
import torch
from support import (
    DTYPES,
    assert_same_bits,
    in_layout,
    name_of,
    on_cpu,
    random,
    random_positions,
    rounded_once,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rope_ext
from rope_ext import RotaryEmbedding, frequencies, reference
from rope_ext.module import tables as kept_tables

B, S, H, K, D = 2, 5, 4, 2, 16
LAYOUTS = ["bshd", "bhsd", "sbhd", "thd"]
FIRST_ROWS = 2048  # of a table, if the model is meant for more
BASE = 10000.0


def make(device="cpu", **options):
    return RotaryEmbedding(D, **{"max_position_embeddings": 64, "device": device, **options})


def q_and_k(device, *, seq=S, dtype=torch.float32, packed=False):
    tokens = (seq,) if packed else (B, seq)
    q = random(*tokens, H, D, dtype=dtype, device=device)
    return q, random(*tokens, K, D, dtype=dtype, device=device, seed=1)


def tables_of(inv_freq, position_ids):
    """cos and sin in float64, rounded to the float32 of the module's tables."""
    cos, sin = reference.cos_sin(*on_cpu([inv_freq, position_ids]))
    return cos.float(), sin.float()


def assert_rotated(got, x, inv_freq, position_ids, **options):
    """To 2 ulp of float32 or x's dtype: the table here is rounded from float64 and may differ."""
    cos, sin = tables_of(inv_freq, position_ids)
    if cos.dim() == 2 and x.dim() == 4:
        cos, sin = cos[None], sin[None]
    expected = reference.apply_rotary(x.cpu().double(), cos.double(), sin.double(), **options)
    eps = max(torch.finfo(x.dtype).eps, 2.0**-23)
    torch.testing.assert_close(
        got.cpu().double(), expected, rtol=2 * eps, atol=2 * 2.0**-23 * x.abs().max().item()
    )


@pytest.mark.parametrize("ids", [None, "S", "1S", "BS", "BS int32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_q_and_k_are_rotated_by_their_positions(dtype, layout, ids, device):
    packed = layout == "thd"
    if packed and ids in ("1S", "BS", "BS int32"):
        return  # packed positions are [T]
    q, k = q_and_k(device, dtype=dtype, packed=packed)
    position_ids = None
    if ids is not None:
        shape = {"S": (S,), "1S": (1, S)}.get(ids, (B, S))
        int_dtype = torch.int32 if "int32" in ids else torch.int64
        position_ids = random_positions(*shape, rows=10**6, dtype=int_dtype, device=device)
    module = make(device)
    outputs = module(*(in_layout(x, layout) for x in (q, k)), position_ids, layout)
    positions = torch.arange(S) if position_ids is None else position_ids
    for x, y in zip((q, k), outputs, strict=True):
        assert y.dtype == dtype
        assert_rotated(in_layout(y, layout), x, module.inv_freq, positions)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rotation_has_the_bits_of_the_operators(dtype, device):
    q, k = q_and_k(device, dtype=dtype)
    ids = random_positions(B, S, rows=100, device=device)
    module = make(device)
    inv_freq, _ = frequencies.default(D, device=device)
    for position_ids, tables in (
        (None, rope_ext.cos_sin_cache(inv_freq, S)),
        (ids, rope_ext.cos_sin(inv_freq, ids)),
    ):
        for x, y in zip((q, k), module(q, k, position_ids), strict=True):
            assert_same_bits(y, rounded_once(x, *tables))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_options_reach_the_rotation(interleaved, device):
    module = make(device, base=5e5, rotary_dim=12, interleaved=interleaved)
    expected, _ = frequencies.default(D, base=5e5, rotary_dim=12, device=device)
    assert_same_bits(module.inv_freq, expected)
    q, k = q_and_k(device)
    for x, y in zip((q, k), module(q, k), strict=True):
        assert_rotated(y, x, module.inv_freq, torch.arange(S), interleaved=interleaved)
        assert_same_bits(y[..., 12:], x[..., 12:])


def test_positions_given_are_those_not_given(device):
    q, k = q_and_k(device)
    module = make(device)
    for shape in ((S,), (1, S), (B, S)):
        ids = torch.arange(S).expand(shape).to(device)
        for a, b in zip(module(q, k, ids), module(q, k), strict=True):
            assert_same_bits(a, b)


def test_inplace_writes_q_and_k(device):
    q, k = q_and_k(device)
    module = make(device)
    expected = module(q, k)
    out_q, out_k = module(q, k, inplace=True)
    assert out_q is q
    assert out_k is k
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


def test_gradients_reach_q_and_k(device):
    q, k = (x.requires_grad_() for x in q_and_k(device))
    module = make(device)
    outputs = module(q, k)
    seeds = [random(*x.shape, device=device, seed=3) for x in (q, k)]
    tables = rope_ext.cos_sin_cache(module.inv_freq, S)
    for grad, seed in zip(torch.autograd.grad(outputs, (q, k), seeds), seeds, strict=True):
        assert_same_bits(grad, rounded_once(seed, *tables, inverse=True))


# ---- the table


def test_sequence_beyond_max_position_embeddings_is_rotated_just_as_exactly(device):
    module = make(device, max_position_embeddings=3)
    for seq in (2, 7, 50):
        q, k = q_and_k(device, seq=seq)
        for x, y in zip((q, k), module(q, k), strict=True):
            assert_rotated(y, x, module.inv_freq, torch.arange(seq))


def test_table_is_made_once_and_grows_by_doubling():
    module = make(max_position_embeddings=131_072)
    rows = [module.table(length)[0].shape[0] for length in range(1, 20_000, 7)]
    sizes = sorted(set(rows))
    assert sizes == [FIRST_ROWS * 2**i for i in range(len(sizes))]
    assert rows == sorted(rows)
    module = make(max_position_embeddings=131_072)
    tables = {module.table(length)[0].data_ptr(): None for length in range(1, 20_000, 7)}
    assert len(tables) <= len(sizes)


def test_a_table_that_grows_computes_the_rows_that_are_missing(monkeypatch):
    made = []

    def counted(inv_freq, length, *, start=0, **options):
        made.append((start, length))
        return rope_ext.cos_sin_cache(inv_freq, length, start=start, **options)

    monkeypatch.setattr(kept_tables, "cos_sin_cache", counted)
    module = rope_ext.RotaryEmbedding(16, max_position_embeddings=8)
    for length in (3, 9, 40):
        cos, sin = module.table(length)
    assert made == [(0, 8), (8, 8), (16, 24)]
    for grown, whole in zip((cos, sin), rope_ext.cos_sin_cache(module.inv_freq, 40), strict=True):
        assert torch.equal(grown, whole)


def test_table_that_is_long_enough_is_the_same_one(device):
    module = make(device)
    first = module.table(3)
    assert module.table(60)[0] is first[0]
    assert module.table(1)[1] is first[1]


def test_table_of_a_short_model_is_no_longer_than_it():
    assert make(max_position_embeddings=64).table(1)[0].shape[0] == 64
    assert make(max_position_embeddings=64).table(500)[0].shape[0] >= 500


def test_long_position_ids_need_no_table(device):
    """A table up to 2^31 would need 137 GB."""
    q, k = q_and_k(device)
    module = make(device)
    ids = torch.tensor([2**31 - 6 + s for s in range(S)], device=device)
    for x, y in zip((q, k), module(q, k, ids), strict=True):
        assert_rotated(y, x, module.inv_freq, ids)


def test_table_made_in_inference_mode_is_good_for_training(device):
    module = make(device)
    q, k = q_and_k(device)
    with torch.inference_mode():
        module(q, k)
        module(q.clone(), k.clone(), inplace=True)
    leaf = q.clone().requires_grad_()
    out, _ = module(leaf, k)
    out.backward(torch.ones_like(out))
    expected = rounded_once(torch.ones(q.shape), *module.table(S), inverse=True)
    assert_same_bits(leaf.grad, expected)


def test_module_made_in_inference_mode_is_good_for_training(device):
    with torch.inference_mode():
        module = make(device)
    q, k = q_and_k(device)
    leaf = q.clone().requires_grad_()
    for ids in (None, torch.arange(S).to(device)):
        out, _ = module(leaf, k, ids)
        (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert grad.cpu().isfinite().all()


# ---- casts and moves


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(device, dtype)": lambda module: module.to("cpu", torch.float16),
    "twice": lambda module: module.half().float(),
    "after use": lambda module: (module(*q_and_k("cpu")), module.bfloat16())[1],
    "inside a model": lambda module: nn.ModuleList([module]).bfloat16()[0],
    "type": lambda module: module.type(torch.bfloat16),
}


def test_write_to_learned_frequencies_through_data_is_seen(device):
    module = make(device, learned=True).eval()
    with torch.no_grad():
        module.table(4)
        module.inv_freq.data.copy_(2 * module.inv_freq.data)
        cos, _ = module.table(4)
        assert_same_bits(cos[:4], rope_ext.cos_sin_cache(module.inv_freq, 4)[0])
        module.inv_freq.data = 2 * module.inv_freq.data
        cos, _ = module.table(4)
        assert_same_bits(cos[:4], rope_ext.cos_sin_cache(module.inv_freq, 4)[0])


@torch.inference_mode()
def test_write_to_an_inference_tensor_is_seen(device):
    module = make(device)
    module.inv_freq = module.inv_freq.clone()  # its version is not checked
    module.table(4)
    module.inv_freq.mul_(2)
    cos, _ = module.table(4)
    assert_same_bits(cos[:4], rope_ext.cos_sin_cache(module.inv_freq, 4)[0])


def test_table_of_a_trace_is_not_kept():
    module = make("cpu")
    q, k = random(B, S, H, D), random(B, S, K, D, seed=1)
    expected = make("cpu")(q, k)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(module(q, k)[0], FakeTensor)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(q, k)
        for got in (module(q, k), traced(q, k)):
            for a, b in zip(got, expected, strict=True):
                assert type(a) is torch.Tensor
                assert_same_bits(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, nn.Module.double], ids=["deepcopy", "double"])
def test_copies_and_casts_in_inference_mode_are_no_inference_tensors(copied):
    with torch.inference_mode():
        module, learned = copied(make("cpu")), copied(make("cpu", learned=True))
    assert not any(buffer.is_inference() for buffer in module.buffers())
    assert not learned.inv_freq.is_inference()
    assert learned.inv_freq.requires_grad


@pytest.mark.parametrize("cast", CASTS)
def test_frequencies_and_table_stay_float32_through(cast):
    module = CASTS[cast](make())
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])
    table = module.table(50)
    assert [t.dtype for t in table] == [torch.float32] * 2
    for a, b in zip(table, rope_ext.cos_sin_cache(module.inv_freq, table[0].shape[0]), strict=True):
        assert_same_bits(a, b)
    q, k = q_and_k("cpu", dtype=torch.bfloat16)
    for a, b in zip(module(q, k), make()(q, k), strict=True):
        assert_same_bits(a, b)


def test_default_dtype_does_not_matter():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = make()
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])


def test_meta_module_has_its_frequencies_after_to_empty(device):
    module = make("meta")
    assert module.inv_freq.is_meta
    module.to_empty(device=device)
    assert module.inv_freq.device.type == device.type
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])
    q, k = q_and_k(device)
    for a, b in zip(module(q, k), make(device)(q, k), strict=True):
        assert_same_bits(a, b)


def test_module_made_under_a_meta_device_and_cast_has_its_frequencies(device):
    """As model loaders do: built on meta in 16 bits, then filled."""
    with torch.device("meta"):
        model = nn.ModuleList([make(None, base=5e5, rotary_dim=8)]).bfloat16()
    model.to_empty(device=device)
    assert_same_bits(model[0].inv_freq, frequencies.default(D, base=5e5, rotary_dim=8)[0])


def test_to_empty_of_a_module_that_is_not_on_meta_keeps_its_frequencies(device):
    module = make(device)
    module.to_empty(device=device)
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])


@pytest.mark.cuda
def test_table_follows_the_module_to_another_device():
    module = make()
    module(*q_and_k("cpu"))
    module.to("cuda")
    q, k = q_and_k("cuda")
    for a, b in zip(module(q, k), make("cuda")(q, k), strict=True):
        assert a.is_cuda
        assert_same_bits(a, b)


def test_table_is_made_anew_where_the_module_goes():
    module = make()
    module.table(5)
    assert module.to("meta").table(5)[0].is_meta


# ---- copies and state dicts


def test_state_dict_round_trip():
    model = nn.ModuleDict({"rope": make(), "linear": nn.Linear(2, 2)})
    other = nn.ModuleDict({"rope": make(), "linear": nn.Linear(2, 2)})
    result = other.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other["linear"].weight, model["linear"].weight)
    assert_same_bits(other["rope"].inv_freq, frequencies.default(D)[0])


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "inside a model"])
def test_older_state_dict_with_inv_freq_loads_and_changes_nothing(nested):
    module = make()
    model = nn.ModuleDict({"rope": module}) if nested else module
    name = "rope.inv_freq" if nested else "inv_freq"
    old = {name: torch.full((D // 2,), 3.0, dtype=torch.bfloat16)}
    model.load_state_dict(old, strict=True)
    assert list(old) == [name]  # the caller's
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])


def test_state_dict_with_another_key_is_still_refused():
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make().load_state_dict({"inv_freqs": torch.ones(D // 2)}, strict=True)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_rotate_alike(duplicate, used, device):
    module = make(device, base=5e5, rotary_dim=8, interleaved=True)
    q, k = q_and_k(device)
    if used:
        module(q, k)
    other = duplicate(module)
    for ids in (None, torch.arange(S).to(device)):
        for a, b in zip(other(q, k, ids), module(q, k, ids), strict=True):
            assert_same_bits(a, b)
    assert str(other) == str(module)


def test_deepcopy_shares_nothing():
    module = make()
    module.table(5)
    other = copy.deepcopy(module)
    other.inv_freq.fill_(0)
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])
    assert other.table(5)[0].data_ptr() != module.table(5)[0].data_ptr()


def test_pickle_holds_no_table():
    module = make(max_position_embeddings=100_000)
    before = len(pickle.dumps(module))
    module.table(50_000)
    assert len(pickle.dumps(module)) < before + 1000


# ---- compiled


@pytest.mark.parametrize("ids", [False, True], ids=["table", "position_ids"])
def test_compiles_to_one_graph_for_all_lengths(ids, device):
    module = make(device, max_position_embeddings=8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for seq in (5, 9, 33, 12):
        q, k = q_and_k(device, seq=seq)
        position_ids = torch.arange(seq).to(device) if ids else None
        for a, b in zip(compiled(q, k, position_ids), module(q, k, position_ids), strict=True):
            assert_same_bits(a, b)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, f"recompiled for a sequence of {seq}"


def test_head_dim_is_enough_for_a_module():
    """Without a number of positions there is no limit. Scalings that need the number raise."""
    module = rope_ext.RotaryEmbedding(D)
    assert module.max_position_embeddings is None
    for seq in (3, 3000):
        q, k = random(1, seq, 1, D), random(1, seq, 1, D)
        table = rope_ext.cos_sin_cache(module.inv_freq, seq)
        for got, expected in zip(module(q, k), rope_ext.apply_rotary_qk(q, k, *table), strict=True):
            assert_same_bits(got, expected)
    with pytest.raises(ValueError, match="to have original_max_position_embeddings, got factor"):
        rope_ext.RotaryEmbedding(D, scaling={"rope_type": "dynamic", "factor": 2.0})


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_dim": 7}, "expected rotary_dim to be even, .* got 7"),
        ({"rotary_dim": D + 2}, f"expected rotary_dim to be even, .* got {D + 2}"),
        ({"rotary_dim": 0}, "expected rotary_dim to be even, .* got 0"),
        ({"base": -1.0}, "expected base to be above 0, got -1.0"),
        (
            {"max_position_embeddings": 2**31},
            "max_position_embeddings to be .* at most 2147483647, got 2147483648",
        ),
        (
            {"max_position_embeddings": 0},
            "max_position_embeddings to be an integer of at least 1 .* got 0",
        ),
    ],
)
def test_arguments_out_of_bounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_tensors_that_do_not_fit_are_refused_and_unchanged():
    q, k = q_and_k("cpu")
    kept = q.clone(), k.clone()
    module = make()
    for inplace in (False, True):
        with pytest.raises(ValueError, match="expected layout to be one of"):
            module(q, k, layout="hsbd", inplace=inplace)
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            module(q, k, torch.arange(S + 1), inplace=inplace)
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            module(q, k, torch.zeros(B + 1, S, dtype=torch.int64), inplace=inplace)
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            module(q[..., :8], k[..., :8], inplace=inplace)
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            module(q[0], k[0], inplace=inplace)
        with pytest.raises(RuntimeError, match="float16 or bfloat16, got bool"):
            module(q, k, torch.ones(S, dtype=torch.bool), inplace=inplace)
    assert_same_bits(q, kept[0])
    assert_same_bits(k, kept[1])


def test_module_left_on_meta_is_refused_beside_real_tensors():
    q, k = q_and_k("cpu")
    for ids in (None, torch.arange(S)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            make("meta")(q, k, ids)


# ---- the frequencies of the table


def test_table_follows_a_replaced_inv_freq(device):
    module = make(device)
    q, k = q_and_k(device)
    module(q, k)
    module.inv_freq = module.inv_freq / 4
    ids = torch.arange(q.shape[1]).to(device)
    for a, b in zip(module(q, k), module(q, k, ids), strict=True):
        assert_same_bits(a, b)


def test_table_follows_a_step_of_learned_frequencies(device):
    module = make(device)
    module.inv_freq.requires_grad_()
    q, k = q_and_k(device)
    ids = torch.arange(q.shape[1]).to(device)
    with torch.no_grad():
        module(q, k)
        module.inv_freq.mul_(0.5)
        for a, b in zip(module(q, k), module(q, k, ids), strict=True):
            assert_same_bits(a, b)
    assert list(module.state_dict()) == []


def test_inv_freq_that_requires_grad_gets_it_without_position_ids(device):
    module = make(device)
    module.inv_freq.requires_grad_()
    q, k = q_and_k(device)
    module(q, k)[0].square().sum().backward()  # the norm does not change: a gradient of about 0
    assert module.inv_freq.grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, q, k: m(q[..., :-2], k[..., :-2]), "expected q to have head_dim"),
        (lambda m, q, k: m(q, k, layout="bsd"), "expected layout to be one of"),
        (lambda m, q, k: m(q[0], k[0]), "expected q to have shape"),
        (lambda m, q, k: m(q[0], k[0], torch.zeros(1, 5).long(), layout="thd"), "position_ids"),
    ],
    ids=["head_dim", "layout", "rank", "positions of a packed batch"],
)
def test_call_that_does_not_fit_is_refused_by_name(call, message):
    module = make()
    with pytest.raises(ValueError, match=f"RotaryEmbedding: {message}|{message}"):
        call(module, *q_and_k("cpu"))
