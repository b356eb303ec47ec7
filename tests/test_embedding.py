"""RotaryEmbedding: its results, its table, and the effect of casts, copies and state dicts."""

import copy
import pickle
import re
from unittest import mock

import pytest
import torch
from support import assert_same_bits, error_of, in_layout, random, random_positions, rounded_once
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rope_ext
from rope_ext import RotaryEmbedding, frequencies
from rope_ext.module import tables as kept_tables

B, S, H, K, D = 2, 5, 4, 2, 16
FIRST_ROWS = 2048  # of a table, if the model is meant for more
IDS_32, IDS_64 = torch.int32, torch.int64
# Layout, shape of position_ids, dtypes of the ids and of q and k: each layout with and without
# positions, each shape with each dtype.
CALLS = [
    ("bshd", None, None, torch.float64),
    ("bshd", (B, S), IDS_32, torch.bfloat16),
    ("bhsd", None, None, torch.bfloat16),
    ("bhsd", (S,), IDS_64, torch.float32),
    ("sbhd", (1, S), IDS_64, torch.float16),
    ("sbhd", (B, S), IDS_64, torch.float32),
    ("thd", None, None, torch.float32),
    ("thd", (S,), IDS_32, torch.bfloat16),
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


def test_q_and_k_are_rotated_by_their_positions(device):
    for layout, shape, ids_dtype, dtype in CALLS:
        q, k = q_and_k(device, dtype=dtype, packed=layout == "thd")
        module, ids = make(device), None
        if shape is not None:
            ids = random_positions(*shape, rows=10**6, dtype=ids_dtype, device=device)
        positions = torch.arange(S, device=device) if ids is None else ids
        outputs = module(*(in_layout(x, layout) for x in (q, k)), ids, layout)
        tables = rope_ext.cos_sin(module.inv_freq, positions)
        for x, y in zip((q, k), outputs, strict=True):
            assert_same_bits(in_layout(y, layout), rounded_once(x, *tables), (layout, shape))


def test_options_reach_the_rotation(device):
    q, k = q_and_k(device)
    for interleaved in (False, True):
        module = make(device, base=5e5, rotary_dim=12, interleaved=interleaved)
        expected, _ = frequencies.default(D, base=5e5, rotary_dim=12, device=device)
        assert_same_bits(module.inv_freq, expected)
        tables = rope_ext.cos_sin_cache(expected, S)
        for x, y in zip((q, k), module(q, k), strict=True):
            assert_same_bits(y, rounded_once(x, *tables, interleaved=interleaved))


def test_inplace_writes_q_and_k(device):
    q, k = q_and_k(device)
    module = make(device)
    expected = module(q, k)
    out_q, out_k = module(q, k, inplace=True)
    assert (out_q is q, out_k is k) == (True, True)
    assert_all_same((q, k), expected)


def test_a_table_that_grows_doubles_and_computes_the_rows_that_are_missing(monkeypatch):
    counted = mock.Mock(wraps=rope_ext.cos_sin_cache)
    monkeypatch.setattr(kept_tables, "cos_sin_cache", counted)

    def made():
        calls, counted.mock_calls = counted.mock_calls, []
        return [(call.kwargs.get("start", 0), call.args[1]) for call in calls]

    module = make(max_position_embeddings=8)
    tables = [module.table(length) for length in (3, 8, 9, 40, 1)]
    assert made() == [(0, 8), (8, 8), (16, 24)]
    assert (tables[0][0] is tables[1][0], tables[3][1] is tables[4][1]) == (True, True)
    assert_all_same(tables[-1], rope_ext.cos_sin_cache(module.inv_freq, 40))
    module = make(max_position_embeddings=131_072)
    for length in range(1, 20_000, 7):
        assert len(module.table(length)[0]) >= length
    doubled = [(FIRST_ROWS * 2**i, FIRST_ROWS * 2**i) for i in range(4)]
    assert made() == [(0, FIRST_ROWS), *doubled]


def test_sequences_beyond_max_position_embeddings_are_rotated_just_as_exactly(device):
    """Without a table too, which would be of 137 GB for the last one."""
    module = make(device, max_position_embeddings=3)
    for first, seq, ids in ((0, 2, False), (0, 7, False), (0, 50, False), (2**31 - 6, 5, True)):
        q, k = q_and_k(device, seq=seq)
        positions = torch.arange(first, first + seq, device=device)
        got = module(q, k, positions if ids else None)
        tables = rope_ext.cos_sin(module.inv_freq, positions)
        assert_all_same(got, [rounded_once(x, *tables) for x in (q, k)])


def test_head_dim_is_enough_for_a_module():
    """Without a number of positions there is no limit. Scalings that need the number raise."""
    module = RotaryEmbedding(D)
    q, k = q_and_k(seq=3000)
    table = rope_ext.cos_sin_cache(module.inv_freq, 3000)
    assert_all_same(module(q, k), rope_ext.apply_rotary_qk(q, k, *table))
    with pytest.raises(ValueError, match="to have original_max_position_embeddings, got factor"):
        RotaryEmbedding(D, scaling={"rope_type": "dynamic", "factor": 2.0})


def test_module_made_in_inference_mode_is_good_for_training(device):
    q, k = q_and_k(device)
    module = make(device)
    with torch.inference_mode():
        module(q, k)
        module(q.clone(), k.clone(), inplace=True)
        made_there = make(device)
    leaves, seeds = [x.clone().requires_grad_() for x in (q, k)], (q.flip(0), k.flip(0))
    expected = [rounded_once(x, *module.table(S), inverse=True) for x in seeds]
    for used in (module, made_there):
        for ids in (None, torch.arange(S, device=device)):
            assert_all_same(torch.autograd.grad(used(*leaves, ids), leaves, seeds), expected)


def test_table_follows_its_frequencies(device):
    for learned, change in (
        (False, lambda module: setattr(module, "inv_freq", module.inv_freq / 4)),
        (False, lambda module: module.inv_freq.mul_(2)),
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
    module, (q, k) = make(), q_and_k()
    expected = make()(q, k)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(module(q, k)[0], FakeTensor)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(q, k)
        assert_all_same((*module(q, k), *traced(q, k)), (*expected, *expected))


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.to("cpu", torch.float16),
        lambda module: (module(*q_and_k()), module.bfloat16())[1],
        lambda module: nn.ModuleList([module]).double()[0],
        lambda module: module.type(torch.bfloat16),
    ],
    ids=["half", "to(device, dtype)", "after use", "inside a model", "type"],
)
def test_frequencies_and_table_stay_float32_through(cast):
    module = cast(make())
    assert_same_bits(module.inv_freq, frequencies.default(D)[0])
    assert_all_same(module.table(64), rope_ext.cos_sin_cache(frequencies.default(D)[0], 64))


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


def test_table_is_made_anew_where_the_module_goes(device):
    module = make()
    module.table(S)
    module.to(device)
    q, k = q_and_k(device)
    assert_all_same(module(q, k), make(device)(q, k))
    assert module.to("meta").table(S)[0].is_meta


def test_copies_and_casts_in_inference_mode_are_no_inference_tensors():
    for copied in (copy.deepcopy, nn.Module.double):
        with torch.inference_mode():
            module, learned = copied(make()), copied(make(learned=True))
        assert not any(buffer.is_inference() for buffer in module.buffers())
        assert not learned.inv_freq.is_inference()
        assert learned.inv_freq.requires_grad


def test_copies_rotate_alike_and_share_nothing(device):
    q, k = q_and_k(device)
    options = {"base": 5e5, "rotary_dim": 8, "interleaved": True}
    module, (expected, _) = make(device, **options), make(device, **options)(q, k)
    unused = len(pickle.dumps(module))
    for _ in range(2):
        for duplicate in (copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
            other = duplicate(module)
            assert_same_bits(other(q, k)[0], expected)
            assert str(other) == str(module)
        module.table(50_000)
    assert len(pickle.dumps(module)) < unused + 1000  # no table
    other = copy.deepcopy(module)
    other.inv_freq.fill_(0)
    assert_same_bits(module(q, k)[0], expected)
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


REFUSED = [
    ({"base": -1.0}, "base to be above 0, got -1.0"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings .* at most 2147483647, got 2147"),
    ({"max_position_embeddings": 0}, "max_position_embeddings to be .* at least 1 .* got 0"),
    ({"max_position_embeddings": True}, "max_position_embeddings to be an integer .* got True"),
    ({"scaling": "yarn"}, "scaling to be a dict or None, got 'yarn'"),
    ({"scaling": {"partial_rotary_factor": "x"}}, "partial_rotary_factor to be a finite number"),
]
CALLS_REFUSED = [
    (lambda q, k: (q[..., :-2], k[..., :-2]), "expected q to have head_dim"),
    (lambda q, k: (q, k, None, "bsd"), "expected layout to be one of"),
    (lambda q, k: (q[0], k[0]), "expected q to have shape"),
    (lambda q, k: (q[0], k[0], torch.zeros(1, 5).long(), "thd"), "position_ids"),
    (lambda q, k: (q, k, torch.arange(S + 1)), "expected"),
    (lambda q, k: (q, k, torch.zeros(B + 1, S).long()), "expected"),
    (lambda q, k: (q, k, torch.ones(S).bool()), "float16 or bfloat16, got bool"),
]


def test_arguments_out_of_bounds_are_refused():
    for options, message in REFUSED:
        assert re.search(f"expected {message}", error_of(make, **options)), options


def test_tensors_that_do_not_fit_are_refused_and_unchanged():
    module, (q, k), kept = make(), q_and_k(), q_and_k()
    for arguments, message in CALLS_REFUSED:
        for inplace in (False, True):
            with pytest.raises((RuntimeError, ValueError), match=message):
                module(*arguments(q, k), inplace=inplace)
    assert_all_same((q, k), kept)
