"""RotaryEmbedding with scaled, length-dependent and learned frequencies."""

import copy
import pickle
import re

import pytest
import torch
from support import assert_same_bits, error_of, on_cpu, random
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from rope_ext import RotaryEmbedding, frequencies, reference

B, S, H, K, D = 2, 5, 4, 2, 16
P = D // 2
ORIGINAL = 64  # tokens after which the frequencies change
ULP = 2.0**-23  # of float32 numbers of about 1

FACTORS = {"short_factor": [1 + i / P for i in range(P)], "long_factor": [2 + i for i in range(P)]}
OF_ORIGINAL = {"original_max_position_embeddings": ORIGINAL}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "ntk": {"alpha": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, **OF_ORIGINAL},
    "longrope": {**FACTORS, **OF_ORIGINAL, "factor": 4.0},
    # a factor on cos and sin for each regime
    "longrope, two factors": {**FACTORS, **OF_ORIGINAL, "short_mscale": 1.25, "long_mscale": 1.5},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **OF_ORIGINAL},
    "proportional": {"partial_rotary_factor": 0.5},
}
BY_LENGTH = [name for name in SCALINGS if name.startswith(("dynamic", "longrope"))]
IN_TRANSFORMERS = [name for name in SCALINGS if name not in ("ntk", BY_LENGTH[-1])]
# One table with a factor on cos and sin, and each kind of table by length.
KINDS = ["yarn", *BY_LENGTH]
# What a call is given: positions, and lengths of regimes, in every kind of graph.
IN_A_GRAPH = [
    ("default", "nothing"),
    ("yarn", "position_ids"),
    *((name, given) for name in ("dynamic", "longrope") for given in ("nothing", "position_ids")),
    ("dynamic", "regime_length"),
    ("longrope", "regimes"),
    ("longrope, two factors", "regime_length"),
]
# positions of successive calls: grow, stay, shrink a little, shrink below, grow again
LAST_POSITIONS = (10, 63, 64, 99, 70, 63, 62, 80, 300, 64, 5, 64)


def scaling_of(name):
    return {"rope_type": name.split(",")[0], **SCALINGS[name]}


def make(name, device="cpu", **options):
    options = {"max_position_embeddings": ORIGINAL, "scaling": scaling_of(name), **options}
    return RotaryEmbedding(D, device=device, **options)


def q_and_k(device="cpu", *, seq=S, packed=False):
    tokens = (seq,) if packed else (B, seq)
    return random(*tokens, H, D, device=device), random(*tokens, K, D, device=device, seed=1)


def truth(module, position_ids, length):
    """cos, sin in float64, rounded, with the frequencies of a sequence of `length` tokens."""
    options = {"base": module.base, "rotary_dim": module.rotary_dim, "length": length}
    options["max_position_embeddings"] = module.max_position_embeddings
    inv_freq, scale = frequencies.from_scaling(D, module.scaling, **options)
    cos, sin = reference.cos_sin(inv_freq, position_ids.cpu(), attention_scaling=scale)
    return cos.float(), sin.float()


def assert_all_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


class NoValueIsRead(TorchDispatchMode):
    """Fails if a tensor's value becomes a Python number: the host would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in ("_local_scalar_dense.default", "is_nonzero.default")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_tables_are_those_of_transformers(name):
    """Call after call. Theirs round the angle, to 2^-24 of it, and cos and sin twice."""
    transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 10000.0, **scaling_of(name)}
    sizes = {"head_dim": D, "max_position_embeddings": ORIGINAL}
    config = transformers.LlamaConfig(**sizes, rope_parameters=parameters)
    theirs, ours = LlamaRotaryEmbedding(config), make(name)
    for last in LAST_POSITIONS:
        position_ids = torch.tensor([[0, 1, last // 2, last], [0, 1, 2, 3]])
        expected = theirs(torch.empty(()), position_ids)
        for got, other in zip(ours.cos_sin(position_ids), expected, strict=True):
            allowed = ours.attention_scaling * (last * 2.0**-24 + 4 * 2.0**-24)
            torch.testing.assert_close(got, other[..., :P], rtol=0, atol=allowed)
        if name == "dynamic":
            assert int(ours.max_seq_len_cached) == int(theirs.max_seq_len_cached)


@pytest.mark.parametrize("name", SCALINGS)
def test_q_and_k_are_rotated_in_the_regime_of_their_length(name, device):
    """On CUDA, and by tensors, pow may round frequencies otherwise: 4 ulp of the largest angle."""
    module, same, batched = make(name, device), make(name, device), make(name, device)
    longest = ORIGINAL
    for seq in (10, 64, 65, 130, 70, 64, 30, 65):
        longest = max(longest, seq) if seq >= ORIGINAL else ORIGINAL
        length = longest if name == "dynamic" else seq
        q, k = q_and_k(device, seq=seq)
        cos, sin = truth(module, torch.arange(seq)[None], length)
        position_ids = torch.arange(seq, device=device)
        results = module(q, k)
        assert_all_same(same(q, k, position_ids), results)
        assert_all_same(batched(q, k, position_ids[None]), results)
        for x, y in zip((q, k), results, strict=True):
            x, options = x.cpu().double(), {"rotary_dim": module.rotary_dim}
            expected = reference.apply_rotary(x, cos.double(), sin.double(), **options)
            # the table to 1 ulp; two products and a sum
            largest = 4 * seq if device.type == "cuda" or name == "dynamic" else 0
            allowed = 1.5 * ULP * (4 + largest) * x.abs().max().item()
            torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_regime_length_decides_for_each_sequence_as_if_it_were_alone(name, device):
    module = make(name, device)
    lengths = torch.tensor([40, 200], device=device)
    q, k = q_and_k(device, seq=30)
    ids = torch.arange(30, device=device) + 7
    for position_ids in (None, ids, ids[None], ids.expand(B, -1)):
        together = module(q, k, position_ids, regime_length=lengths)
        mine = position_ids if position_ids is None or position_ids.dim() == 1 else position_ids[:1]
        for b in range(B):
            one = slice(b, b + 1)
            for length in (lengths[b].item(), lengths[b]):
                alone = module(q[one], k[one], mine, regime_length=length)
                for x, y in zip(together, alone, strict=True):
                    # angles below 40 radians, of frequencies that may be rounded differently
                    atol = 1.5 * ULP * (4 + 4 * 40) * y.abs().max().item()
                    torch.testing.assert_close(x[one], y, rtol=0, atol=atol)
    if name == "dynamic":
        assert int(module.max_seq_len_cached) == ORIGINAL


@pytest.mark.parametrize("name", BY_LENGTH)
def test_regime_length_of_packed_sequences_is_one_a_token(name, device):
    module = make(name, device)
    q, k = q_and_k(device, seq=9, packed=True)
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], device=device)
    lengths = torch.tensor([40] * 4 + [200] * 5, device=device)
    out_q, _ = module(q, k, ids, "thd", regime_length=lengths)
    for part, length in ((slice(0, 4), 40), (slice(4, 9), 200)):
        alone, _ = module(q[part], k[part], ids[part], "thd", regime_length=length)
        torch.testing.assert_close(out_q[part], alone, rtol=0, atol=40 * ULP * 4)
    without_ids, _ = module(q, k, None, "thd", regime_length=lengths)
    expected, _ = module(q, k, torch.arange(9, device=device), "thd", regime_length=lengths)
    assert_same_bits(without_ids, expected)


@pytest.mark.parametrize("name", KINDS)
def test_keys_of_a_decoded_sequence_are_those_of_its_prefill_with_one_regime(name, device):
    """A prompt of 60 and 10 new tokens, one by one: past the original length of 64."""
    module, (q, k), ids = make(name, device), q_and_k(device, seq=70), torch.arange(70).to(device)
    _, whole = module(q, k, regime_length=70)
    steps = [slice(0, 60), *(slice(s, s + 1) for s in range(60, 70))]
    for length in (70, None):
        keys = [module(q[:, s], k[:, s], ids[s], regime_length=length)[1] for s in steps]
        # as documented: without a length, earlier keys keep the rotation of their regime
        assert torch.equal(torch.cat(keys, 1), whole) == (length == 70 or name == "yarn")


@pytest.mark.parametrize("name", KINDS)
def test_no_value_is_waited_for(name, device):
    module = make(name, device)
    lengths = torch.tensor([40, 200], device=device)
    q, k = q_and_k(device, seq=70)
    module(q, k)  # the first table
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoValueIsRead():
            for length in (None, 100, lengths, lengths[0]):
                for ids in (None, torch.arange(70, device=device)):
                    module(q, k, ids, regime_length=length)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name", KINDS)
def test_captured_graph_follows_the_positions(name):
    module, eager = make(name, "cuda"), make(name, "cuda")
    q, k = q_and_k("cuda", seq=1)
    ids = torch.zeros(B, 1, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(q, k, ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(q, k, ids)
    for position in LAST_POSITIONS:
        ids.fill_(position)
        graph.replay()
        assert_all_same(out, eager(q, k, ids))


@pytest.mark.parametrize(("name", "given"), IN_A_GRAPH)
def test_scaling_compiles_to_one_graph_for_all_lengths(name, given, device):
    module, eager = make(name, device), make(name, device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    graphs = None
    for seq in (50, 90, 33, 70, 12, 65):
        arguments = [*q_and_k(device, seq=seq)]
        if given != "nothing":
            arguments.append(torch.arange(seq, device=device))
        regimes = torch.tensor([seq, seq + 9], device=device)
        length = {"regime_length": seq + 3, "regimes": regimes}.get(given)
        got = compiled(*arguments, regime_length=length)
        assert_all_same(got, eager(*arguments, regime_length=length))
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, f"recompiled for a sequence of {seq}"
    if name == "dynamic":
        assert_same_bits(module.max_seq_len_cached.float(), eager.max_seq_len_cached.float())


def test_scaling_compiles_once_more_at_most_without_asking_for_dynamic_shapes():
    for name in ("yarn", "dynamic", "longrope"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(make(name), backend=counter, fullgraph=True)
        for seq in (50, 90, 33):
            compiled(*q_and_k(seq=seq), torch.arange(seq))
        assert counter.frame_count <= 2, name


def test_learned_frequencies_compile_with_their_gradient():
    module, eager = make("yarn", learned=True), make("yarn", learned=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for seq in (7, 12):
        q, k = q_and_k(seq=seq)
        grads = []
        for function, parameter in ((compiled, module.inv_freq), (eager, eager.inv_freq)):
            out, _ = function(q, k)
            grads.append(torch.autograd.grad(out, parameter, torch.ones_like(out))[0])
        assert_same_bits(*grads)


@pytest.mark.parametrize("name", KINDS)
def test_scaled_frequencies_stay_float32_through_casts_and_meta(name, device):
    plain = make(name, device)
    with torch.device("meta"):
        on_meta = nn.ModuleList([make(name, None)])
    q, k = q_and_k(device, seq=70)
    expected = make(name, device)(q, k)
    for module in (
        nn.ModuleList([make(name, device)]).bfloat16()[0],
        on_meta.bfloat16().to_empty(device=device)[0],
        copy.deepcopy(plain),
        pickle.loads(pickle.dumps(plain)),
    ):
        assert_all_same(module.buffers(), plain.buffers())
        assert_all_same(module(q, k), expected)
        assert list(module.state_dict()) == []


def test_refused_and_empty_sequences_leave_what_was_seen():
    for ids in (None, torch.arange(100)):
        module = make("dynamic")
        q, k = q_and_k(seq=100)
        with pytest.raises(RuntimeError, match="99"):
            module(q, k[:, :99], ids)
        assert int(module.max_seq_len_cached) == ORIGINAL
        module(q, k)
        module(*q_and_k(seq=0), ids if ids is None else ids[:0])
        assert int(module.max_seq_len_cached) == 100


def test_the_longest_length_so_far_is_copied_with_the_module():
    with torch.inference_mode():
        module = copy.deepcopy(make("dynamic"))
    compiled = torch.compile(module.cos_sin, backend="aot_eager", fullgraph=True)
    compiled(torch.arange(100))  # outside of inference mode
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        assert int(other.max_seq_len_cached) == 100


@pytest.mark.parametrize("name", BY_LENGTH)
def test_module_made_and_used_in_inference_mode_goes_on_outside_of_it(name, device):
    q, k = q_and_k(device, seq=70)
    made_outside = make(name, device)
    with torch.inference_mode():
        module = make(name, device)
        first, _ = module(q, k)
        made_outside(q, k)
    for used in (module, made_outside):
        leaf = q.clone().requires_grad_()
        out, _ = used(leaf, k)
        assert_same_bits(out, first)
        assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("name", ["linear", "yarn", "proportional"])
def test_learned_frequencies_start_as_the_scaling_says_and_are_in_the_state_dict(name, device):
    module = make(name, device, learned=True)
    assert list(module.state_dict()) == ["inv_freq"]
    assert [n for n, _ in module.named_parameters()] == ["inv_freq"]
    assert_same_bits(module.inv_freq, make(name, device).inv_freq)
    with torch.device("meta"):
        on_meta = nn.ModuleList([make(name, None, learned=True)]).bfloat16()
    assert isinstance(on_meta.to_empty(device=device)[0].inv_freq, nn.Parameter)
    assert_same_bits(on_meta[0].inv_freq, module.inv_freq)
    other = make("default", device, learned=True)
    other.load_state_dict(module.state_dict(), strict=True)
    assert_same_bits(other.inv_freq, module.inv_freq)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({}, strict=True)


@pytest.mark.parametrize(("name", "ids"), [("default", True), ("yarn", False)])
def test_gradient_of_learned_frequencies_is_that_of_plain_float64(name, ids, device):
    module = make(name, device, learned=True)
    inputs = q_and_k(device)
    position_ids = torch.arange(S, device=device) if ids else None
    seeds = [random(*x.shape, device=device, seed=3) for x in inputs]
    got = torch.autograd.grad(module(*inputs, position_ids), module.inv_freq, seeds)[0]
    inv_freq = module.inv_freq.detach().cpu().double().requires_grad_()
    scale = module.attention_scaling
    table = reference.cos_sin(inv_freq, torch.arange(S)[None], attention_scaling=scale)
    outputs = [reference.apply_rotary(x, *table) for x in on_cpu(inputs, torch.float64)]
    expected = torch.autograd.grad(outputs, inv_freq, on_cpu(seeds, torch.float64))[0]
    # float32 sums of B S (H + K) products of about 3 normal numbers and positions up to S
    atol = B * S * (H + K) * S * 27 * 2.0**-24
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=atol)


def test_learned_frequencies_stay_the_same_float32_parameter_through_casts():
    for cast in (nn.Module.half, lambda module: nn.ModuleList([module]).double()[0]):
        module = make("default", learned=True)
        parameter, before = module.inv_freq, module.inv_freq.detach().clone()
        module(*q_and_k())[0].sum().backward()
        module = cast(module)
        assert module.inv_freq is parameter  # the optimizer's
        assert module.inv_freq.grad.dtype == torch.float32
        assert_same_bits(module.inv_freq, before)


def test_learned_frequencies_of_a_16_bit_checkpoint_become_float32():
    saved = {"inv_freq": frequencies.default(D, base=500.0)[0].bfloat16()}
    for assign in (False, True):
        module = make("default", learned=True)
        module.load_state_dict(saved, strict=True, assign=assign)
        assert isinstance(module.inv_freq, nn.Parameter)
        assert_same_bits(module.inv_freq, saved["inv_freq"].float())


LLAMA = {"model_type": "llama", "head_dim": D, "max_position_embeddings": 256, "rope_theta": 5e5}


def test_module_from_a_config_is_the_one_from_its_arguments(device):
    q, k = q_and_k(device, seq=70)
    for name in IN_TRANSFORMERS:
        config = {**LLAMA, "rope_scaling": scaling_of(name)}
        module = RotaryEmbedding.from_config(config, device=device)
        other = make(name, device, base=5e5, max_position_embeddings=256)
        assert_all_same(module(q, k), other(q, k))
        assert module.attention_scaling == other.attention_scaling


def test_rope_theta_and_partial_rotary_factor_of_a_dict_count():
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    scaling["partial_rotary_factor"] = 0.5
    module = RotaryEmbedding(D, max_position_embeddings=ORIGINAL, scaling=scaling)
    expected, _ = frequencies.linear(D, factor=2.0, base=5e5, rotary_dim=D // 2)
    assert_same_bits(module.inv_freq, expected)
    assert module.rotary_dim == D // 2
    assert "linear" in str(module)
    assert scaling["rope_theta"] == 5e5  # the caller's


def test_pairs_are_those_of_the_model_type():
    for model_type, interleaved in (("llama", False), ("cohere", True), ("deepseek_v3", True)):
        config = {**LLAMA, "model_type": model_type}
        assert RotaryEmbedding.from_config(config).interleaved is interleaved
        other = RotaryEmbedding.from_config(config, interleaved=not interleaved)
        assert other.interleaved is not interleaved
        assert not RotaryEmbedding.from_config({**config, "rope_interleave": False}).interleaved


def test_a_config_without_one_position_a_token_has_no_module():
    config = {**LLAMA, "rope_parameters": {"full_attention": None, "sliding_attention": {}}}
    assert RotaryEmbedding.from_config(config, "full_attention") is None
    config = {**LLAMA, "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}}
    with pytest.raises(ValueError, match="tokens of one position each, got the rope_type 'axial'"):
        RotaryEmbedding.from_config(config)


REFUSED = [
    ({"scaling": {"rope_type": "yarn", "factor": 4.0}}, "to have original_max_position_emb"),
    ({"scaling": scaling_of("dynamic"), "learned": True}, "learned=True, got 'dynamic'"),
    ({"scaling": scaling_of("longrope"), "learned": True}, "learned=True, got 'longrope'"),
    ({"scaling": {"rope_theta": 5e5}, "base": 1e4}, "rope_theta of scaling, 500000.0, got 1"),
    ({"scaling": {"partial_rotary_factor": 0.5}, "rotary_dim": 16}, "times head_dim, 8, got 16"),
    ({"scaling": scaling_of("proportional"), "rotary_dim": 8}, "rotary_dim to be head_dim"),
]
REGIMES_REFUSED = [
    (0, "at least 1, got 0"),
    (True, "an int.*, got True"),
    (100.0, "an int.*, got 100.0"),
    (torch.ones(B), r"int32 or int64 of shape .* got torch.float32 \[2\]"),
    (torch.ones(B, 1, dtype=torch.int64), r"\[\] or \[B\] = \[2\], got \[2, 1\]"),
    (torch.ones(B + 1, dtype=torch.int64), r"\[\] or \[B\] = \[2\], got \[3\]"),
    (torch.ones((), dtype=torch.int64, device="meta"), "on the device of inv_freq, cpu"),
]


def test_combinations_that_make_no_sense_are_refused_by_name():
    for options, message in REFUSED:
        got = error_of(RotaryEmbedding, D, **{"max_position_embeddings": ORIGINAL, **options})
        assert re.search(f"expected .*{message}", got), options


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_regime_length_that_does_not_fit_is_refused_by_name(name):
    for length, message in REGIMES_REFUSED:
        for ids in (None, torch.arange(S)):
            with pytest.raises((ValueError, TypeError), match=f"regime_length .*{message}"):
                make(name)(*q_and_k(), ids, regime_length=length)
    for shape in ((16,), (3, 5)):
        with pytest.raises(ValueError, match=f"to have shape .* or .{shape[0]}., .* got .2."):
            make(name).cos_sin(torch.zeros(shape).long(), regime_length=torch.tensor([40, 80]))
