"""RotaryEmbedding: its results, its table, and the effect of casts, copies and state dicts."""

import copy
import pickle
import re

import pytest
import torch
from support import (
    DTYPES,
    assert_same_bits,
    error_of,
    in_layout,
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
FIRST_ROWS = 2048  # of a table, if the model is meant for more
# Layout, shape of position_ids, dtypes of the ids and of q and k: each layout with and without
# positions, each shape with each dtype.
CALLS = [
    ("bshd", None, torch.int64, torch.float32),
    ("bshd", (B, S), torch.int32, torch.bfloat16),
    ("bhsd", None, torch.int64, torch.bfloat16),
    ("bhsd", (S,), torch.int64, torch.float32),
    ("sbhd", (1, S), torch.int64, torch.bfloat16),
    ("sbhd", (B, S), torch.int64, torch.float32),
    ("thd", None, torch.int64, torch.float32),
    ("thd", (S,), torch.int32, torch.bfloat16),
]


def make(device="cpu", **options):
    return RotaryEmbedding(D, **{"max_position_embeddings": 64, "device": device, **options})


def q_and_k(device="cpu", *, seq=S, dtype=torch.float32, packed=False):
    tokens = (seq,) if packed else (B, seq)
    q = random(*tokens, H, D, dtype=dtype, device=device)
    return q, random(*tokens, K, D, dtype=dtype, device=device, seed=1)


def assert_all_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def assert_rotated(got, x, inv_freq, position_ids, **options):
    """To 2 ulp of float32 or x's dtype: the table here is rounded from float64 and may differ."""
    cos, sin = reference.cos_sin(*on_cpu([inv_freq, position_ids]))
    cos, sin = cos.float().double(), sin.float().double()
    if cos.dim() == 2 and x.dim() == 4:
        cos, sin = cos[None], sin[None]
    expected = reference.apply_rotary(x.cpu().double(), cos, sin, **options)
    eps = max(torch.finfo(x.dtype).eps, 2.0**-23)
    torch.testing.assert_close(
        got.cpu().double(), expected, rtol=2 * eps, atol=2 * 2.0**-23 * x.abs().max().item()
    )


# ---- results


def test_q_and_k_are_rotated_by_their_positions(device):
    for layout, shape, ids_dtype, dtype in CALLS:
        q, k = q_and_k(device, dtype=dtype, packed=layout == "thd")
        ids, positions = None, torch.arange(S)
        if shape is not None:
            ids = random_positions(*shape, rows=10**6, dtype=ids_dtype, device=device)
            positions = ids
        module = make(device)
        outputs = module(*(in_layout(x, layout) for x in (q, k)), ids, layout)
        for x, y in zip((q, k), outputs, strict=True):
            assert y.dtype == dtype
            assert_rotated(in_layout(y, layout), x, module.inv_freq, positions)


def test_rotation_has_the_bits_of_the_operators(device):
    module = make(device)
    ids = random_positions(B, S, rows=100, device=device)
    inv_freq, _ = frequencies.default(D, device=device)
    for dtype in DTYPES:
        q, k = q_and_k(device, dtype=dtype)
        for position_ids, tables in (
            (None, rope_ext.cos_sin_cache(inv_freq, S)),
            (ids, rope_ext.cos_sin(inv_freq, ids)),
        ):
            for x, y in zip((q, k), module(q, k, position_ids), strict=True):
                assert_same_bits(y, rounded_once(x, *tables))


def test_options_reach_the_rotation(device):
    q, k = q_and_k(device)
    for interleaved in (False, True):
        module = make(device, base=5e5, rotary_dim=12, interleaved=interleaved)
        expected, _ = frequencies.default(D, base=5e5, rotary_dim=12, device=device)
        assert_same_bits(module.inv_freq, expected)
        for x, y in zip((q, k), module(q, k), strict=True):
            assert_rotated(y, x, module.inv_freq, torch.arange(S), interleaved=interleaved)
            assert_same_bits(y[..., 12:], x[..., 12:])


def test_positions_given_are_those_not_given(device):
    q, k = q_and_k(device)
    module = make(device)
    for shape in ((S,), (1, S), (B, S)):
        ids = torch.arange(S).expand(shape).to(device)
        assert_all_same(module(q, k, ids), module(q, k))


def test_inplace_writes_q_and_k(device):
    q, k = q_and_k(device)
    module = make(device)
    expected = module(q, k)
    out_q, out_k = module(q, k, inplace=True)
    assert out_q is q
    assert out_k is k
    assert_all_same((q, k), expected)


def test_gradients_reach_q_and_k(device):
    q, k = (x.requires_grad_() for x in q_and_k(device))
    module = make(device)
    seeds = [random(*x.shape, device=device, seed=3) for x in (q, k)]
    tables = rope_ext.cos_sin_cache(module.inv_freq, S)
    for grad, seed in zip(torch.autograd.grad(module(q, k), (q, k), seeds), seeds, strict=True):
        assert_same_bits(grad, rounded_once(seed, *tables, inverse=True))


def test_compiles_to_one_graph_for_all_lengths(device):
    for with_ids in (False, True):
        module = make(device, max_position_embeddings=8)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
        graphs = None
        for seq in (5, 9, 33, 12):
            q, k = q_and_k(device, seq=seq)
            ids = torch.arange(seq).to(device) if with_ids else None
            assert_all_same(compiled(q, k, ids), module(q, k, ids))
            graphs = graphs or counter.frame_count
            assert counter.frame_count == graphs, f"recompiled for a sequence of {seq}"


# ---- the table


def test_a_table_that_grows_doubles_and_computes_the_rows_that_are_missing(monkeypatch):
    made = []

    def counted(inv_freq, length, *, start=0, **options):
        made.append((start, length))
        return rope_ext.cos_sin_cache(inv_freq, length, start=start, **options)

    monkeypatch.setattr(kept_tables, "cos_sin_cache", counted)
    module = make(max_position_embeddings=8)
    tables = [module.table(length) for length in (3, 8, 9, 40, 1)]
    assert made == [(0, 8), (8, 8), (16, 24)]
    assert tables[0][0] is tables[1][0]
    assert tables[3][1] is tables[4][1]
    assert_all_same(tables[-1], rope_ext.cos_sin_cache(module.inv_freq, 40))
    made.clear()
    module = make(max_position_embeddings=131_072)
    for length in range(1, 20_000, 7):
        assert len(module.table(length)[0]) >= length
    assert made == [
        (0, FIRST_ROWS), *((FIRST_ROWS * 2**i, FIRST_ROWS * 2**i) for i in range(4))
    ]  # fmt: skip


def test_sequences_beyond_max_position_embeddings_are_rotated_just_as_exactly(device):
    """Without a table too, which would be of 137 GB for the last one."""
    module = make(device, max_position_embeddings=3)
    for seq in (2, 7, 50):
        q, k = q_and_k(device, seq=seq)
        for x, y in zip((q, k), module(q, k), strict=True):
            assert_rotated(y, x, module.inv_freq, torch.arange(seq))
    q, k = q_and_k(device)
    ids = torch.arange(2**31 - 6, 2**31 - 6 + S).to(device)
    for x, y in zip((q, k), module(q, k, ids), strict=True):
        assert_rotated(y, x, module.inv_freq, ids)


def test_head_dim_is_enough_for_a_module():
    """Without a number of positions there is no limit. Scalings that need the number raise."""
    module = RotaryEmbedding(D)
    assert module.max_position_embeddings is None
    q, k = q_and_k(seq=3000)
    table = rope_ext.cos_sin_cache(module.inv_freq, 3000)
    assert_all_same(module(q, k), rope_ext.apply_rotary_qk(q, k, *table))
    with pytest.raises(ValueError, match="to have original_max_position_embeddings, got factor"):
        RotaryEmbedding(D, scaling={"rope_type": "dynamic", "factor": 2.0})


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


def test_table_follows_its_frequencies(device):
    for learned, change in (
        (False, lambda module: setattr(module, "inv_freq", module.inv_freq / 4)),
        (False, lambda module: module.inv_freq.mul_(2)),
        (True, lambda module: module.inv_freq.mul_(2)),
        (True, lambda module: module.inv_freq.data.mul_(2)),
        (True, lambda module: setattr(module.inv_freq, "data", 2 * module.inv_freq.data)),
    ):
        module = make(device, learned=learned).eval()
        with torch.no_grad():
            module.table(4)
            change(module)
            assert_same_bits(module.table(4)[0][:4], rope_ext.cos_sin_cache(module.inv_freq, 4)[0])


@torch.inference_mode()
def test_write_to_an_inference_tensor_is_seen(device):
    module = make(device)
    module.inv_freq = module.inv_freq.clone()  # its version is not checked
    module.table(4)
    module.inv_freq.mul_(2)
    assert_same_bits(module.table(4)[0][:4], rope_ext.cos_sin_cache(module.inv_freq, 4)[0])


def test_inv_freq_that_requires_grad_gets_it_without_position_ids(device):
    module = make(device)
    module.inv_freq.requires_grad_()
    q, k = q_and_k(device)
    module(q, k)[0].square().sum().backward()  # the norm does not change: a gradient of about 0
    assert module.inv_freq.grad is not None
    assert list(module.state_dict()) == []


def test_table_of_a_trace_is_not_kept():
    module = make()
    q, k = q_and_k()
    expected = make()(q, k)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(module(q, k)[0], FakeTensor)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(q, k)
        for got in (module(q, k), traced(q, k)):
            assert {type(x) for x in got} == {torch.Tensor}
            assert_all_same(got, expected)


# ---- casts, moves and copies


CASTS = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to(device, dtype)": lambda module: module.to("cpu", torch.float16),
    "twice": lambda module: module.half().float(),
    "after use": lambda module: (module(*q_and_k()), module.bfloat16())[1],
    "inside a model": lambda module: nn.ModuleList([module]).bfloat16()[0],
    "type": lambda module: module.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_frequencies_and_table_stay_float32_through(cast):
    module = CASTS[cast](make())
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])
    assert_all_same(module.table(64), rope_ext.cos_sin_cache(frequencies.default(D)[0], 64))
    q, k = q_and_k(dtype=torch.bfloat16)
    assert_all_same(module(q, k), make()(q, k))


def test_a_module_has_its_frequencies_after_to_empty(device):
    """As model loaders do: built on meta in 16 bits, then filled."""
    options = {"base": 5e5, "rotary_dim": 8}
    with torch.device("meta"):
        model = nn.ModuleList([make(None, **options)]).bfloat16()
    assert model[0].inv_freq.is_meta
    q, k = q_and_k(device)
    for module in (model[0], make(device, **options)):
        module.to_empty(device=device)
        assert module.inv_freq.device.type == device.type
        assert_same_bits(module.inv_freq, frequencies.default(D, **options)[0])
        assert_all_same(module(q, k), make(device, **options)(q, k))


@pytest.mark.cuda
def test_table_follows_the_module_to_another_device():
    module = make()
    module(*q_and_k())
    module.to("cuda")
    q, k = q_and_k("cuda")
    assert_all_same(module(q, k), make("cuda")(q, k))


def test_table_is_made_anew_where_the_module_goes():
    module = make()
    module.table(5)
    assert module.to("meta").table(5)[0].is_meta


def test_copies_and_casts_in_inference_mode_are_no_inference_tensors():
    for copied in (copy.deepcopy, nn.Module.double):
        with torch.inference_mode():
            module, learned = copied(make()), copied(make(learned=True))
        assert not any(buffer.is_inference() for buffer in module.buffers())
        assert not learned.inv_freq.is_inference()
        assert learned.inv_freq.requires_grad


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_rotate_alike(duplicate, device):
    q, k = q_and_k(device)
    for used in (False, True):
        module = make(device, base=5e5, rotary_dim=8, interleaved=True)
        if used:
            module(q, k)
        other = DUPLICATES[duplicate](module)
        for ids in (None, torch.arange(S).to(device)):
            assert_all_same(other(q, k, ids), module(q, k, ids))
        assert str(other) == str(module)


def test_a_copy_shares_nothing_and_a_pickle_holds_no_table():
    module = make(max_position_embeddings=100_000)
    before = len(pickle.dumps(module))
    module.table(50_000)
    assert len(pickle.dumps(module)) < before + 1000
    other = copy.deepcopy(module)
    other.inv_freq.fill_(0)
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])
    assert other.table(5)[0].data_ptr() != module.table(5)[0].data_ptr()


def test_state_dict_has_no_frequencies_and_older_ones_change_nothing():
    model = nn.ModuleDict({"rope": make(), "linear": nn.Linear(2, 2)})
    saved = model.state_dict()
    assert set(saved) == {"linear.weight", "linear.bias"}
    saved["rope.inv_freq"] = torch.full((D // 2,), 3.0, dtype=torch.bfloat16)
    model.load_state_dict(saved, strict=True)
    assert "rope.inv_freq" in saved  # the caller's
    assert_same_bits(model["rope"].inv_freq, frequencies.default(D)[0])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make().load_state_dict({"inv_freqs": torch.ones(D // 2)}, strict=True)


# ---- refusals


REFUSED = [
    ({"rotary_dim": 7}, "rotary_dim to be even, .* got 7"),
    ({"base": -1.0}, "base to be above 0, got -1.0"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings .* at most 2147483647, got 2147"),
    ({"max_position_embeddings": 0}, "max_position_embeddings to be .* at least 1 .* got 0"),
    ({"max_position_embeddings": 32.5}, "max_position_embeddings to be an integer .* got 32.5"),
    ({"max_position_embeddings": True}, "max_position_embeddings to be an integer .* got True"),
    ({"scaling": "yarn"}, "scaling to be a dict or None, got 'yarn'"),
    ({"scaling": {"partial_rotary_factor": "x"}}, "partial_rotary_factor to be a finite number"),
]
CALLS_REFUSED = [
    (lambda m, q, k, **o: m(q[..., :-2], k[..., :-2], **o), "expected q to have head_dim"),
    (lambda m, q, k, **o: m(q, k, layout="bsd", **o), "expected layout to be one of"),
    (lambda m, q, k, **o: m(q[0], k[0], **o), "expected q to have shape"),
    (lambda m, q, k, **o: m(q[0], k[0], torch.zeros(1, 5).long(), "thd", **o), "position_ids"),
    (lambda m, q, k, **o: m(q, k, torch.arange(S + 1), **o), "expected"),
    (lambda m, q, k, **o: m(q, k, torch.zeros(B + 1, S).long(), **o), "expected"),
    (lambda m, q, k, **o: m(q, k, torch.ones(S).bool(), **o), "float16 or bfloat16, got bool"),
]


def test_arguments_out_of_bounds_are_refused():
    for options, message in REFUSED:
        assert re.search(f"expected {message}", error_of(make, **options)), options


def test_tensors_that_do_not_fit_are_refused_and_unchanged():
    module, (q, k), kept = make(), q_and_k(), q_and_k()
    for call, message in CALLS_REFUSED:
        for inplace in (False, True):
            with pytest.raises((RuntimeError, ValueError), match=message):
                call(module, q, k, inplace=inplace)
    assert_all_same((q, k), kept)


def test_module_left_on_meta_is_refused_beside_real_tensors():
    for ids in (None, torch.arange(S)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            make("meta")(*q_and_k(), ids)
