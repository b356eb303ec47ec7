"""Megatron-Core's own models and functions on the CPU, with rotations of rope_ext under
``apply_rope_fusion=True`` and with their own, unfused ones.
"""

import contextlib
import inspect
import re
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

megatron = pytest.importorskip("megatron.core", reason="pip install megatron-core")
from megatron.core import parallel_state  # noqa: E402
from megatron.core.fusions import fused_mla_yarn_rope_apply  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer import attention, multi_latent_attention  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)
from rotating_models import rotations_of_rope_ext  # noqa: E402
from support import assert_same_bits, name_of, naming, random  # noqa: E402

from rope_ext.integrations import megatron as plugin  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "without_a_gpu"),
    pytest.mark.filterwarnings("ignore"),  # of Megatron-Core, about packages for GPUs
]
S, B, H, D, R = 8, 2, 3, 16, 12
CU_SEQLENS = torch.tensor([0, 8, 16, 40], dtype=torch.int32)  # lengths are multiples of 2 x 4
T = 40
OWN = rope_utils.apply_rotary_pos_emb
OWN_NAMES = ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Megatron-Core makes its angles on the current CUDA device, and forks its generators."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(multi_latent_attention, "HAVE_TE", False)  # True without it, in 0.16
    yield
    plugin.unpatch()


# ---- models


class CoreAttention(DotProductAttention):
    """Theirs, which also takes packed sequences and, for latent attention, sizes of heads."""

    def __init__(self, *args, k_channels=None, v_channels=None, **kwargs):
        super().__init__(*args, **kwargs)

    def forward(self, q, k, v, mask, packed_seq_params=None, **kwargs):
        self.hidden_size_per_partition = q.shape[-2] * v.shape[-1]
        if packed_seq_params is None:
            return super().forward(q, k, v, mask, **kwargs)
        outputs = []
        for begin, end in pairwise(packed_seq_params.cu_seqlens_q.tolist()):
            each = [x[begin:end].unsqueeze(1) for x in (q, k, v)]
            outputs.append(super().forward(*each, causal(end - begin), **kwargs))
        return torch.cat(outputs).squeeze(1)


def causal(length):
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


@pytest.fixture(scope="module")
def one_rank():
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


LAYERS, TOKENS = 2, 16
PACKED = {"cu_seqlens_q": [0, 6, 16], "max_seqlen_q": 10}
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "use_cpu_initialization": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.2,  # large enough for the loss to depend on positions
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "yarn",
    "rotary_scaling_factor": 4,
    "original_max_position_embeddings": 32,
    "multi_latent_attention": True,
}
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 8,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": True,
}
# name -> arguments of the config, attributes set afterwards, arguments of the model, packed
MODELS = {
    "grouped heads": ({"num_query_groups": 2}, {}, {}, False),
    "a part rotates": ({}, {}, {"rotary_percent": 0.5}, False),
    "interleaved": ({}, {"rotary_interleaved": True}, {}, False),
    "yarn": ({}, YARN, {"position_embedding_type": "yarn"}, False),
    "multimodal": (
        {"mrope_section": [2, 3, 3]},
        {},
        {"position_embedding_type": "mrope"},
        False,
    ),
    "packed": ({}, {}, {}, True),
    "packed, interleaved": ({}, {"rotary_interleaved": True}, {}, True),
    "packed, yarn": ({}, YARN, {"position_embedding_type": "yarn"}, True),
    "latent": (LATENT, {}, {}, False),
    "latent, packed": (LATENT, {}, {}, True),
}


def made(name):
    """A model, and the arguments of its forward."""
    arguments, attributes, options, packed = MODELS[name]
    latent = arguments is LATENT
    config = (MLATransformerConfig if latent else TransformerConfig)(**SIZES, **arguments)
    vars(config).update(attributes)
    spec = get_gpt_layer_local_spec(multi_latent_attention=latent)
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    torch.manual_seed(0)
    options = {"position_embedding_type": "rope", **options}
    model = GPTModel(config, spec, vocab_size=96, max_sequence_length=64, **options)
    batch = 1 if packed else B
    tokens = torch.randint(0, 96, (batch, TOKENS))
    positions = torch.arange(TOKENS).expand(batch, TOKENS)
    if "mrope_section" in arguments:  # of tokens in a grid, others for each sample
        positions = torch.randint(0, 20, (3, batch, TOKENS))
    inputs = {
        "input_ids": tokens,
        "position_ids": positions,
        "attention_mask": causal(TOKENS),
        "labels": tokens.roll(-1, 1),
    }
    if packed:
        bounds = torch.tensor(PACKED["cu_seqlens_q"], dtype=torch.int32)
        length = PACKED["max_seqlen_q"]
        inputs["packed_seq_params"] = PackedSeqParams(
            "thd", bounds, bounds, max_seqlen_q=length, max_seqlen_kv=length
        )
    return model, inputs


def trained(model, inputs, steps=2):
    """The losses of all tokens in each step, and the parameters afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_with_the_unfused_rotation(name, one_rank):
    model, inputs = made(name)
    fused, _ = made(name)
    expected = trained(model, inputs)
    plugin.patch()
    fused.config.apply_rope_fusion = True
    assert rotations_of_rope_ext(model, **inputs) == 0
    assert rotations_of_rope_ext(fused, **inputs) == 2 * LAYERS  # q and k
    for got, wanted in zip(trained(fused, inputs), expected, strict=True):
        assert_same_bits(got, wanted)


def test_a_config_with_fusion_needs_the_patch_before(one_rank):
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        TransformerConfig(**SIZES, apply_rope_fusion=True)
    plugin.patch()
    assert TransformerConfig(**SIZES, apply_rope_fusion=True).apply_rope_fusion


def test_bfloat16_models_deviate_from_float32_as_with_the_unfused_rotation(one_rank):
    model, inputs = made("grouped heads")
    exact = model(**inputs)
    model.bfloat16()
    unfused = (model(**inputs) - exact).abs().mean()
    plugin.patch()
    model.config.apply_rope_fusion = True
    fused = (model(**inputs) - exact).abs().mean()
    # Most of the deviation comes from the other operations of the model.
    assert 0 < fused < 1.1 * unfused


# ---- functions


class Ranks:
    """A process group, as far as the rotation asks."""

    def __init__(self, size, rank):
        self.size, self.rank = lambda: size, lambda: rank


# Theirs rounds the table, two products and the sum, ours the sum: each by at most 2^-8 of
# |x1 c| + |x2 s|, which is below 8 times the scale for the random numbers of these sizes.
SCALE = 1.375
LIMIT = 4 * 2**-8 * 8 * SCALE
SHAPE, PACKED_T = (S, B, H, D), (T, H, D)
LATENT_FLAG = "mla_rotary_interleaved" in inspect.signature(OWN).parameters
# name -> shape of t, shape of freqs, config, arguments
CASES = {
    "halves": (SHAPE, (S, 1, 1, D), {}, {}),
    "a part": (SHAPE, (S, 1, 1, R), {}, {}),
    "interleaved": (SHAPE, (S, 1, 1, R), {"rotary_interleaved": True}, {}),
    "scaled": (SHAPE, (S, 1, 1, R), {}, {"mscale": SCALE}),
    "angles of each sample": (SHAPE, (S, B, 1, R), {}, {}),
    "neighbours to halves": (SHAPE, (S, 1, 1, R), {"multi_latent_attention": True}, {}),
    "packed": (PACKED_T, (24, 1, 1, R), {}, {"cu_seqlens": CU_SEQLENS}),
    "packed, interleaved": (
        PACKED_T,
        (30, 1, 1, R),
        {"rotary_interleaved": True},
        {"cu_seqlens": CU_SEQLENS.long(), "mscale": 0.75},
    ),
    "packed, angles of each token": (PACKED_T, (T, 1, 1, R), {}, {"cu_seqlens": CU_SEQLENS}),
    "packed, neighbours to halves": (
        PACKED_T,
        (24, 1, 1, R),
        {"multi_latent_attention": True},
        {"cu_seqlens": CU_SEQLENS},
    ),
}


def results_of(function, inputs, dtype):
    """The results for inputs in a dtype, and the gradients for random ones of the results."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    ys = function(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    grads = [random(*y.shape, dtype=inputs[0].dtype, seed=1).to(dtype) for y in ys]
    return [y.detach() for y in ys] + list(torch.autograd.grad(ys, leaves, grads))


def assert_same_results(fused, unfused, inputs, heads_add=False):
    """The bits are those of the unfused formula in float32 (float64 for float64), rounded once; in
    bfloat16 itself that rounds each step.

    heads_add: the last gradient is a sum over the heads, which is rounded before it is rotated.
    """
    dtype = inputs[0].dtype
    got = results_of(fused, inputs, dtype)
    exact = results_of(unfused, inputs, torch.promote_types(dtype, torch.float32))
    below_float32 = dtype == torch.bfloat16
    bits = len(got) - (heads_add and below_float32)
    for a, b in zip(got[:bits], exact[:bits], strict=True):
        assert_same_bits(a, b.to(dtype))
    for a, b in zip(got, results_of(unfused, inputs, dtype), strict=True):
        assert (a - b).abs().max() <= (LIMIT * (H if heads_add else 1) if below_float32 else 0)


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of
)


@DTYPES
def test_functions_have_the_bits_of_the_unfused_formula(dtype):
    plugin.patch()
    for name, (shape, freqs_shape, config, options) in CASES.items():
        for size, rank in [(1, 0), (2, 1), (4, 0)] if "cu_seqlens" in options else [(1, 0)]:
            t = random(shape[0] // size, *shape[1:], dtype=dtype)
            freqs = 3 * random(*freqs_shape)  # all channels differ, so a wrong transpose shows
            flags = {"cp_group": Ranks(size, rank), **options}
            if LATENT_FLAG:
                flags["mla_rotary_interleaved"] = config.get("multi_latent_attention", False)
            fused, unfused = (
                partial(function, freqs=freqs, config=config_with(fusion, **config), **flags)
                for function, fusion in ((rope_utils.apply_rotary_pos_emb, True), (OWN, False))
            )
            with naming((name, size, rank)):
                assert_same_results(fused, unfused, [t])


def config_with(fusion, **fields):
    """What the functions ask of a config."""
    defaults = {"rotary_interleaved": False, "multi_latent_attention": False}
    return SimpleNamespace(apply_rope_fusion=fusion, **{**defaults, **fields})


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_functions_of_transformer_engine_are_there_under_their_names(interleaved):
    assert [getattr(rope_utils, name) for name in OWN_NAMES] == [None, None]
    plugin.patch()
    config = config_with(False, rotary_interleaved=interleaved)
    freqs, t, packed = random(24, 1, 1, R), random(24, B, H, D), random(T // 2, H, D)
    rotated = rope_utils.fused_apply_rotary_pos_emb(t, freqs, interleaved=interleaved)
    assert_same_bits(rotated, OWN(t, freqs, config, cp_group=Ranks(1, 0)))
    options = {"cp_size": 2, "cp_rank": 1, "interleaved": interleaved}
    rotated = rope_utils.fused_apply_rotary_pos_emb_thd(packed, CU_SEQLENS, freqs, **options)
    assert_same_bits(rotated, OWN(packed, freqs, config, CU_SEQLENS, cp_group=Ranks(2, 1)))


QK, E, V = 10, 8, 6  # channels of latent attention: keys, positions, values


def unfused_latent(q, kv, shared, **options):
    """As Megatron-Core's latent attention without fusion."""
    if LATENT_FLAG:
        options["mla_rotary_interleaved"] = True
    options["config"] = config_with(False, multi_latent_attention=True)
    rotated, shared = OWN(q[..., QK:], **options), OWN(shared, **options)
    k, value = kv.split([QK, V], -1)
    key = torch.cat((k, shared.expand(*k.shape[:-1], E)), -1)
    return torch.cat((q[..., :QK], rotated), -1), key, value


def fused_latent(q, kv, shared, freqs, *packed):
    tables, module = (freqs.cos(), freqs.sin()), multi_latent_attention
    query = module.fused_apply_mla_rope_for_q(q, *tables, QK, E, *packed)
    return query, *module.fused_apply_mla_rope_for_kv(kv, shared, *tables, E, QK, V, *packed)


@DTYPES
def test_latent_attention_has_the_bits_of_the_unfused_formula(dtype):
    plugin.patch()
    for size, rank, bounds in [(1, 0, None), (1, 0, CU_SEQLENS), (4, 2, CU_SEQLENS)]:
        tokens = (S, B) if bounds is None else (T // size,)
        sizes = (H, QK + E), (H, QK + V), (1, E)
        inputs = [random(*tokens, *each, dtype=dtype) for each in sizes]
        freqs = 3 * random(S if bounds is None else 24, 1, 1, E)
        options = {"freqs": freqs, "cu_seqlens": bounds, "cp_group": Ranks(size, rank)}
        with naming((size, rank)):
            assert_same_results(
                lambda *x, packed=(freqs, bounds, rank, size): fused_latent(*x, *packed),
                partial(unfused_latent, **options),
                inputs,
                heads_add=True,
            )


def test_signatures_are_theirs():
    for name in ("fused_apply_mla_rope_for_q", "fused_apply_mla_rope_for_kv"):
        ours, theirs = getattr(plugin, name), getattr(fused_mla_yarn_rope_apply, name)
        assert ours is not theirs
        names = [[*inspect.signature(f).parameters] for f in (ours, theirs)]
        assert names[0] == names[1]
    plugin.patch()
    assert inspect.signature(rope_utils.apply_rotary_pos_emb) == inspect.signature(OWN)


def test_every_module_gets_its_functions_back():
    plugin.patch()
    plugin.patch()
    fused = multi_latent_attention.fused_apply_mla_rope_for_q
    assert fused is plugin.fused_apply_mla_rope_for_q
    assert attention.apply_rotary_pos_emb is rope_utils.apply_rotary_pos_emb is not OWN
    plugin.unpatch()
    assert attention.apply_rotary_pos_emb is rope_utils.apply_rotary_pos_emb is OWN
    assert multi_latent_attention.fused_apply_mla_rope_for_q is not fused
    assert [getattr(rope_utils, name) for name in OWN_NAMES] == [None, None]


def test_an_unknown_release_is_refused_and_nothing_is_replaced(monkeypatch):
    for version in ("0.15.3", "0.20.0+abc", "1.16.1"):
        monkeypatch.setattr(megatron, "__version__", version)
        message = f"megatron.patch: expected megatron-core 0.16 to 0.19, got {version}"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            plugin.patch()
    assert rope_utils.apply_rotary_pos_emb is OWN


ANGLES, X, PACKED_X = random(S, 1, 1, R), random(S, B, H, D), random(T, H, D)
TABLE, SHARED = random(24, 1, 1, E), random(S, B, 1, E)
ROTATE, ROTATE_PACKED = plugin.fused_apply_rotary_pos_emb, plugin.fused_apply_rotary_pos_emb_thd
OF_Q, OF_KV = plugin.fused_apply_mla_rope_for_q, plugin.fused_apply_mla_rope_for_kv
REFUSED = [
    (ROTATE, (PACKED_X, ANGLES), r"t to have shape \[S, B, H, D\], got shape \[40, 3, 16\]"),
    (ROTATE, (X, ANGLES[:, 0]), r"freqs to have shape \[s2, 1, 1, R\], got shape \[8, 1, 12\]"),
    (ROTATE, (X, ANGLES.expand(-1, 3, -1, -1)), r"freqs to have the S and B of t, got .* 3, 1, 12"),
    (ROTATE, (X, ANGLES[:7]), "freqs to have rows for 8 tokens"),
    (ROTATE_PACKED, (PACKED_X, CU_SEQLENS, ANGLES), "freqs to have a row for position 8, got 8 r"),
    (ROTATE_PACKED, (PACKED_X, CU_SEQLENS, ANGLES, 2, 2), r"cp_rank to be in \[0, 2\), .* got 2"),
    (OF_Q, (X, TABLE, TABLE, QK, E), r"t to have 10 \+ 8 channels, got shape \[8, 2, 3, 16\]"),
    (OF_Q, (X, TABLE[..., :4], TABLE, 8, E), r"cos to have shape \[s2, 1, 1, 8\], got .* 1, 1, 4"),
    (
        OF_Q,
        (X, TABLE, TABLE[:, 0], 8, E),
        r"sin to have shape \[s2, 1, 1, 8\], got .* 1, 8",
    ),
    (OF_Q, (X, TABLE, TABLE, 8, E, None, 0, 1, True), "rotary_interleaved to be False, got True"),
    (OF_Q, (X, TABLE, TABLE, 8, E, None, 1, 1), r"cp_rank to be in \[0, 1\)"),
    (OF_KV, (X, SHARED, TABLE, TABLE, E, 8, 9), r"kv to have 8 \+ 9 channels"),
    (OF_KV, (X, SHARED[0], TABLE, TABLE, E, 8, 8), r"k_pos_emb to have shape \[8, 2, 1, 8\], got"),
]


def test_refusals_name_function_argument_expected_and_got():
    for function, arguments, message in REFUSED:
        with naming(message), pytest.raises(ValueError, match=f"^rope_ext .*: expected {message}"):
            function(*arguments)
    with pytest.raises(RuntimeError, match="position"):  # of the operator
        OF_Q(PACKED_X, TABLE[:9], TABLE[:9], 8, E, CU_SEQLENS)
    with pytest.raises(TypeError, match="expected cos to be a Tensor, got None"):
        OF_Q(X, None, TABLE, 8, E)
