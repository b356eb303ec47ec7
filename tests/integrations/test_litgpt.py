"""LitGPT's own models, trained and generating with rotations of rope_ext and with their own."""

import copy
import inspect
import sys
from types import ModuleType

import pytest
import torch

model = pytest.importorskip("litgpt.model", reason="pip install litgpt")
import litgpt.lora  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.generate.base import generate  # noqa: E402
from rotating_models import rotations_of_rope_ext  # noqa: E402
from support import DTYPES, assert_same_bits, name_of, naming, random, random_table  # noqa: E402

from rope_ext.integrations import litgpt as plugin  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "unpatched")
B, H, T, D, LAYERS = 2, 4, 12, 16, 3
TOKENS = torch.randint(0, 96, (B, T), generator=torch.Generator().manual_seed(1))
OWN = {name: getattr(model, name) for name in ("apply_rope", "apply_rope_interleave")}
OURS = {name: getattr(plugin, name) for name in OWN}

# Sizes of all models; then, by name, what differs.
SIZES = {"block_size": 64, "n_layer": LAYERS, "n_embd": 64, "n_head": H, "padded_vocab_size": 96}
LLAMA = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "n_query_groups": 2}
LLAMA |= {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 96}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 16,
}
YARN = {
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_seq_len": 16,
    "mscale": 1.0,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
GEMMA = {"rope_local_base_freq": 100.0, "rope_indices": [1, 0, 1], "sliding_window_size": 16}
CONFIGS = {
    "pythia": {},  # a quarter of the channels rotates
    "llama": {**LLAMA, "rope_adjustments": LLAMA3},
    "yarn": {**LLAMA, "rope_adjustments": YARN},
    "interleave": {**LLAMA, "rope_interleave": True},
    "latent": {**LLAMA, "n_query_groups": H, "latent_attention": {**LATENT, "v_head_dim": 16}},
    "gemma 3": {**LLAMA, **GEMMA, "sliding_window_indices": [1, 0, 1], "norm_qk": True},
}
CONFIGS["latent, interleave"] = {**CONFIGS["latent"], "rope_interleave": True}


@pytest.fixture
def unpatched():
    yield
    plugin.unpatch()


def made(name):
    torch.manual_seed(0)
    gpt = GPT(Config(**SIZES, **CONFIGS[name]))
    for weight in gpt.parameters():  # large enough for the tokens to depend on their positions
        torch.nn.init.normal_(weight, std=0.2)
    return gpt


def trained(gpt, steps=3):
    """The losses, and the parameters afterwards."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        logits = gpt(TOKENS[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), list(gpt.parameters())


def generated(gpt):
    with torch.device("cpu"):
        gpt.set_kv_cache(batch_size=1)
    return generate(gpt.eval(), TOKENS[0], 40, top_k=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_train_and_generate_as_with_their_own_rotation(name):
    gpt = made(name)
    untrained = copy.deepcopy(gpt)
    losses, parameters = trained(gpt)
    with torch.no_grad():
        tokens = generated(gpt)
    plugin.patch()
    assert rotations_of_rope_ext(untrained, TOKENS) == 2 * LAYERS  # q and k
    # float32 rotations and their gradients have the same bits, so everything has.
    losses_of_ours, parameters_of_ours = trained(untrained)
    assert_same_bits(losses_of_ours, losses)
    for got, expected in zip(parameters_of_ours, parameters, strict=True):
        assert_same_bits(got, expected)
    with torch.no_grad():
        assert torch.equal(generated(untrained), tokens)
    assert len(tokens.unique()) > 10


def test_models_with_lora_rotate_with_rope_ext():
    torch.manual_seed(0)
    config = litgpt.lora.Config(**SIZES, **CONFIGS["llama"], lora_r=2, lora_query=True)
    gpt = litgpt.lora.GPT(config)
    before = gpt(TOKENS)
    plugin.patch()
    assert rotations_of_rope_ext(gpt, TOKENS) == 2 * LAYERS
    assert_same_bits(gpt(TOKENS), before)


def test_bfloat16_is_nearer_to_float32_than_with_their_rotation():
    gpt = made("llama")
    exact = gpt(TOKENS)
    gpt.bfloat16()  # the tables too
    before = (gpt(TOKENS) - exact).abs()
    plugin.patch()
    after = (gpt(TOKENS) - exact).abs()
    # The other operations of the model round as before, which is most of the deviation.
    assert after.mean() < 1.1 * before.mean()


# x and the tables: as the models have them, then what the documentation allows as well.
SHAPES = {"no heads": (B, T, D), "five dimensions": (B, 2, 3, T, D)}


def operands(case, dtype, table_dtype):
    if case in SHAPES:
        x = random(*SHAPES[case], dtype=dtype)
    else:  # the first channels of heads
        x = random(B, T, H, D + 8, dtype=dtype).transpose(1, 2)[..., :D]
    rows = B if case == "positions of each sequence" else 1
    tables = random_table(rows, T, D, 2, dtype=table_dtype)
    if case == "several bases":  # last stride 2
        return x, *(table[..., 1] for table in tables)
    return x, *(table[..., 1].contiguous() for table in tables)


CASES = ("heads", "no heads", "five dimensions", "positions of each sequence", "several bases")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", OWN)
def test_functions_have_the_bits_of_theirs_in_the_arithmetic_of_the_tables(name, dtype):
    arithmetic = torch.promote_types(dtype, torch.float32)
    for case in CASES:
        x, cos, sin = operands(case, dtype, arithmetic)
        if name == "apply_rope_interleave":
            x = x.contiguous()  # theirs views neighbours
        weight = random(*x.shape, dtype=dtype, seed=1)
        results = []
        for function in (OURS[name], OWN[name]):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = function(leaf, cos, sin)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, weight)))
        (y, gradient), (their_y, their_gradient) = results
        with naming(case):
            assert_same_bits(y, their_y)
            if dtype == arithmetic:
                assert_same_bits(gradient, their_gradient)
            else:  # theirs rounds two terms and their sum: three times half an ulp
                limit = 1.5 * torch.finfo(dtype).eps * 2 * weight.abs().max()
                assert (gradient - their_gradient).abs().max() <= limit


@pytest.mark.parametrize("name", OWN)
def test_bfloat16_tables_round_once(name):
    x, cos, sin = operands("heads", torch.bfloat16, torch.bfloat16)
    x = x.contiguous()
    got, theirs = (functions[name](x, cos, sin) for functions in (OURS, OWN))
    in_float32 = [t.float() for t in (x, cos, sin)]
    assert_same_bits(got, OWN[name](*in_float32).bfloat16())
    # Theirs rounds two products and the sum, ours the sum: each by up to 2^-8 of |x1 c| + |x2 s|.
    size, c, s = (t.abs() for t in in_float32)
    size = torch.maximum(OWN[name](size, c, s), OWN[name](size, c, -s))
    assert ((got - theirs).abs() <= 3 * 2**-8 * size).all()


@pytest.mark.parametrize("name", OWN)
def test_signatures_are_theirs(name):
    assert inspect.signature(OURS[name]) == inspect.signature(OWN[name])


def test_modules_that_imported_a_function_get_the_replacement_and_lose_it_again(monkeypatch):
    before, after = ModuleType("imported_before"), ModuleType("imported_after")
    for module in (before, after):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before.apply_rope = model.apply_rope
    plugin.patch()
    plugin.patch()
    after.apply_rope = model.apply_rope
    assert before.apply_rope is model.apply_rope is plugin.apply_rope
    plugin.unpatch()
    assert before.apply_rope is after.apply_rope is model.apply_rope is OWN["apply_rope"]
    plugin.unpatch()
    assert plugin.apply_rope is OURS["apply_rope"]


def test_an_unknown_release_is_refused_and_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(plugin, "version", lambda name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"litgpt.patch: expected litgpt 0.5, got 0.6.0"):
        plugin.patch()
    assert model.apply_rope is OWN["apply_rope"]


X, TABLE = random(B, H, T, D), random(1, T, D)
REFUSED = [
    (
        (X[0, 0], TABLE, TABLE),
        r"x to have shape \[B, ..., T, R\] with an even R, got shape \[12, 16",
    ),
    (
        (X[..., :3], TABLE[..., :3], TABLE[..., :3]),
        r"x .* with an even R, got shape \[2, 4, 12, 3\]",
    ),
    ((X, TABLE[0], TABLE), r"cos to have shape \[1, 12, 16\], or \[2, ...\], got shape \[12, 16\]"),
    ((X, TABLE, TABLE[:, 1:]), r"sin to have shape \[1, 12, 16\], .* got shape \[1, 11, 16\]"),
    ((X, TABLE[..., :8], TABLE[..., :8]), r"cos to have shape .* got shape \[1, 12, 8\]"),
    ((X, TABLE.expand(3, -1, -1), TABLE), r"cos to have shape .* got shape \[3, 12, 16\]"),
]


@pytest.mark.parametrize("name", OWN)
def test_refusals_name_function_argument_expected_and_got(name):
    for arguments, message in REFUSED:
        with naming(message), pytest.raises(ValueError, match=f"litgpt.{name}: expected {message}"):
            OURS[name](*arguments)
    with pytest.raises(TypeError, match=f"litgpt.{name}: expected cos to be a Tensor, got None"):
        OURS[name](X, None, TABLE)
