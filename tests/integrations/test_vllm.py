"""The plugin for vLLM: every rotary class, a server on the CPU, and the bits of a trainer."""

import json
import logging
import math
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, name_of, random, rounded_once

pytest.importorskip("vllm")

from trainers_rotation import trainers_rotation
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import custom_op
from vllm.model_executor.layers import rotary_embedding as package
from vllm.model_executor.layers.rotary_embedding import base, ernie45_vl_rope

import rope_ext
from rope_ext.demo import models, weights
from rope_ext.integrations import vllm as plugin

HEAD_DIM, LONGEST = 64, 256
BASE = 10000.0
# rope_parameters of get_rope, by the class that it makes of them.
CLASSES = {
    "RotaryEmbedding": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "Llama3RotaryEmbedding": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "LinearScalingRotaryEmbedding": {"rope_type": "linear", "factor": 3.0},
    "NTKScalingRotaryEmbedding": {"rope_type": "ntk", "factor": 3.0, "mixed_b": 0.6},
    "DynamicNTKScalingRotaryEmbedding": {
        "rope_type": "dynamic",
        "factor": 3.0,
        "max_trained_positions": 64,
    },
    "DynamicNTKAlphaRotaryEmbedding": {"rope_type": "dynamic", "alpha": 100.0},
    "YaRNScalingRotaryEmbedding": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.7,
    },
    "DeepseekScalingRotaryEmbedding": {
        "rope_type": "deepseek_yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.9,
        "mscale_all_dim": 0.5,
    },
    "DeepseekV4ScalingRotaryEmbedding": {
        "rope_type": "deepseek_yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "is_deepseek_v4": True,
        "rope_dim": 32,
    },
    "Gemma4RotaryEmbedding": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "MRotaryEmbedding": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
    "MRotaryEmbeddingInterleaved": {
        "rope_type": "openpangu",
        "mrope_section": [8, 12, 12],
        "mrope_interleaved": True,
    },
    "BailingMRotaryEmbedding": {"rope_type": "bailing_mrope", "mrope_section": [8, 12, 12]},
    "Ernie4_5_VLRotaryEmbedding": {"mrope_section": [12, 12, 8]},  # not of get_rope
    "Phi3LongRoPEScaledRotaryEmbedding": {
        "rope_type": "longrope",
        "short_factor": [1 + i / 7 for i in range(HEAD_DIM // 2)],
        "long_factor": [2 + i / 5 for i in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(autouse=True)
def vllm_of_one_test(monkeypatch):
    """vLLM with the plugin, and afterwards without, with max_model_len LONGEST."""
    monkeypatch.setattr(package, "_ROPE_DICT", {})
    monkeypatch.setattr(custom_op, "op_registry_oot", dict(custom_op.op_registry_oot))
    longrope = "Phi3LongRoPEScaledRotaryEmbedding"
    monkeypatch.setattr(package, longrope, getattr(package, longrope))
    config = VllmConfig()
    object.__setattr__(config, "model_config", type("Model", (), {"max_model_len": LONGEST}))
    with set_current_vllm_config(config):
        plugin.register()
        yield config.compilation_config
    custom_op.get_cached_compilation_config.cache_clear()


def made(name, dtype=torch.float32, neox=True):
    """A class's instance as get_rope makes it, so with the plugin one of rope_ext."""
    parameters = CLASSES[name]
    if name == "Ernie4_5_VLRotaryEmbedding":
        arguments = HEAD_DIM, HEAD_DIM, LONGEST, BASE, neox, dtype
        return ernie45_vl_rope.Ernie4_5_VLRotaryEmbedding(*arguments, **parameters)
    parameters = {"rope_theta": BASE, **parameters}
    return package.get_rope(HEAD_DIM, LONGEST, neox, parameters, dtype)


def made_by_vllm(name, *args, **kwargs):
    """The same without rope_ext."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "_ROPE_DICT", {})
        patch.setattr(custom_op, "op_registry_oot", {})
        ours = package.Phi3LongRoPEScaledRotaryEmbedding
        patch.setattr(package, "Phi3LongRoPEScaledRotaryEmbedding", ours.vllm_class)
        return made(name, *args, **kwargs)


def positions_for(name, tokens=12):
    generator = torch.Generator().manual_seed(3)
    axes = (3,) if name.startswith(("MRotary", "Bailing", "Ernie")) else ()
    return torch.randint(0, 64, (*axes, tokens), generator=generator)


NEOX = [pytest.param(True, id="half-split"), pytest.param(False, id="interleaved")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("neox", NEOX)
@pytest.mark.parametrize("name", CLASSES)
def test_each_class_computes_what_vllms_own_computes_without_its_rounding(name, neox, dtype):
    longrope = name.startswith("Phi3")
    if longrope and not neox:
        with pytest.raises(ValueError, match="only supports neox_style"):
            made(name, dtype, neox)
        return
    ours, own = made(name, dtype, neox), made_by_vllm(name, dtype, neox)
    assert type(ours).__name__ == f"RopeExt{name}"
    assert type(own).__name__ == name
    # The buffer that models read keeps its meaning and dtype, rounded once from the exact values.
    buffer = "long_short_cos_sin_cache" if longrope else "cos_sin_cache"
    table, own_table = ours.float32_table, getattr(own, buffer)
    assert table.dtype == torch.float32
    assert getattr(ours, buffer).dtype == own_table.dtype
    torch.testing.assert_close(getattr(ours, buffer), table.to(own_table.dtype), rtol=0, atol=0)
    # vLLM rounds an angle of at most 1024 to float32, by 2^-15, and the table to its dtype.
    eps = torch.finfo(own_table.dtype).eps
    largest = table.abs().max()
    assert ((table - own_table.float()).abs() <= (2.0**-15 + 2 * eps) * largest).all()

    positions = positions_for(name)
    q = random(12, 3 * HEAD_DIM, dtype=dtype, seed=1)
    k = random(12, HEAD_DIM, dtype=dtype, seed=2)
    if name.startswith("Deepseek"):
        q, k = q.view(12, 3, HEAD_DIM), k.view(12, 1, HEAD_DIM)
    forward = own.forward if longrope or name.endswith("Interleaved") else own.forward_native
    theirs = forward(positions, q.clone(), k.clone())
    given = q.clone(), k.clone()
    rotated = ours(positions, *given)
    for x, y, z, in_place in zip((q, k), rotated, theirs, given, strict=True):
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert y.data_ptr() == in_place.data_ptr()
        # Its table, two products and a sum, each rounded to its dtype (float32 at most twice).
        allowed = (2.0**-15 + 4 * eps) * largest * x.float().abs().amax() * math.sqrt(2)
        assert ((y.float() - z.reshape(y.shape).float()).abs() <= allowed).all()
        assert not torch.equal(y, x)
        # And its bits are those of the exact rows: one rounding.
        cos, sin = (t.contiguous() for t in table.chunk(2, -1))
        if positions.dim() == 2:
            index = positions[ours.pair_axes].T
            rows = cos.gather(0, index), sin.gather(0, index), None
        else:
            at = positions + 64 if longrope else positions  # the rows of the long factors
            rows = cos, sin, at
        offset = HEAD_DIM - own.rotary_dim if "V4" in name else 0
        options = {"interleaved": not neox, "rotary_offset": offset}
        expected = rounded_once(x.view(12, -1, HEAD_DIM), *rows, **options)
        assert_same_bits(y.view(expected.shape), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_tables_are_exact(name):
    """Within 1 ulp of the true value for the class's frequencies, however large the position."""
    ours = made(name)
    inv_freq = ours.__dict__["_inv_freq"].double()
    table, factor = ours.float32_table, getattr(ours, "mscale", 1.0)
    if name.startswith("Phi3"):
        table, factor = table[64:], ours.long_mscale
    if name.startswith("Linear"):
        inv_freq = (inv_freq.float() / 3.0).double()
    angle = torch.arange(len(table)).double()[:, None] * inv_freq
    exact = torch.cat((angle.cos(), angle.sin()), -1) * factor
    assert ((table.double() - exact).abs() <= 2.0**-24 * factor + 2.0**-25).all()
    angle = torch.arange(len(table)).float()[:, None] * inv_freq.float()
    rounded = torch.cat((angle.cos(), angle.sin()), -1) * factor
    assert (rounded.double() - exact).abs().max() > 2 * (table.double() - exact).abs().max()


def test_every_rotary_class_of_vllm_is_known():
    known = plugin.KINDS.keys() | plugin.LEFT.keys()
    assert plugin._classes(package).keys() == known
    assert known - CLASSES.keys() - plugin.LEFT.keys() == {  # tested below
        "ApplyRotaryEmb",
        "Llama4VisionRotaryEmbedding",
    }


def test_query_alone_offsets_and_the_inverse():
    positions = positions_for("RotaryEmbedding")
    q = random(12, 3 * HEAD_DIM)
    rotated, key = made("RotaryEmbedding")(positions, q.clone())
    assert key is None
    assert_same_bits(rotated, made("RotaryEmbedding")(positions, q.clone(), q.clone())[1])

    deepseek = made("DeepseekV4ScalingRotaryEmbedding")
    q, k = random(12, 3, 128), random(12, 1, 128, seed=1)  # heads of another size
    offsets = torch.arange(12) * 3
    shifted = deepseek(positions, q.clone(), k.clone(), offsets)
    for x, y in zip(shifted, deepseek(positions + offsets, q.clone(), k.clone()), strict=True):
        assert_same_bits(x, y)
    back, _ = deepseek(positions, shifted[0].clone(), None, offsets, inverse=True)
    own = made_by_vllm("DeepseekV4ScalingRotaryEmbedding")
    theirs, _ = own.forward_native(positions, shifted[0], None, offsets, inverse=True)
    torch.testing.assert_close(back, theirs, rtol=0, atol=1e-4)
    assert_same_bits(back[..., :96], q[..., :96])


@pytest.mark.parametrize("neox", NEOX)
def test_rows_that_a_vision_encoder_gives(neox):
    x, (cos, sin) = random(2, 5, 3, 8), random(2, 5, 4)
    ours = package.common.ApplyRotaryEmb(is_neox_style=neox)
    assert type(ours).__name__ == "RopeExtApplyRotaryEmb"
    for given in (x, x[0]):
        before = given.clone()
        expected = rounded_once(given, cos, sin, interleaved=not neox)
        assert_same_bits(ours(given, cos, sin), expected)
        torch.testing.assert_close(ours.forward_native(given, cos, sin), expected)
        assert torch.equal(given, before)


def test_patches_of_llama4():
    arguments = HEAD_DIM, HEAD_DIM // 2, 16, BASE, False, torch.complex64
    ours = package.Llama4VisionRotaryEmbedding(*arguments)
    q, k = random(2, 17, 3, HEAD_DIM), random(2, 17, 1, HEAD_DIM, seed=1)
    for x, y, z in zip((q, k), ours(q, k), ours.forward_native(q, k), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-6)
        assert torch.equal(y[:, 16], x[:, 16])  # the class token
        assert not torch.equal(y[:, :16], x[:, :16])


def test_an_instance_on_the_meta_device_has_meta_tables():
    with torch.device("meta"):
        assert made("RotaryEmbedding").float32_table.is_meta
        assert made("MRotaryEmbedding").float32_table.is_meta


def test_position_past_the_table_raises_and_writes_nothing():
    q = random(1, HEAD_DIM)
    before = q.clone()
    with pytest.raises(RuntimeError, match=rf"position_ids.*{LONGEST}"):
        made("RotaryEmbedding")(torch.tensor([LONGEST]), q, q.clone())
    assert torch.equal(q, before)


# ------------------------------------------------------------------------------ on, off, refusals


def test_it_is_on_where_vllm_compiles_and_turns_most_custom_ops_off(vllm_of_one_test):
    vllm_of_one_test.custom_ops = ["none"]
    ours = made("RotaryEmbedding")
    assert ours._forward_method.__func__ is type(ours).forward_cpu
    named = ["none", "+RotaryEmbedding", "+ApplyRotaryEmb"]  # part of the key of vLLM's cache
    assert vllm_of_one_test.custom_ops == named


def test_custom_ops_leave_a_class_to_vllm(vllm_of_one_test):
    vllm_of_one_test.custom_ops.append("-RotaryEmbedding")
    assert type(made("RotaryEmbedding")) is package.RotaryEmbedding
    assert type(made("Llama3RotaryEmbedding")) is not package.Llama3RotaryEmbedding
    assert vllm_of_one_test.disabled_custom_ops["RotaryEmbedding"] == 1


def test_classes_that_keep_vllms_rotation_are_named_in_the_log(caplog):
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    fope = package.FourierRotaryEmbedding(
        64, 64, 16, BASE, True, torch.float32, False, 2, 8, True, 1
    )
    logger.removeHandler(caplog.handler)
    assert type(fope) is package.FourierRotaryEmbedding
    assert "leaves FourierRotaryEmbedding to vLLM: its table is learned" in caplog.text


def refused(expected, function, *args):
    with pytest.raises(plugin.Unsupported, match=expected) as error:
        function(*args)
    assert "VLLM_PLUGINS=''" in str(error.value)
    assert "(vllm 0." in str(error.value)


def test_a_class_that_means_something_else_is_refused_by_name(monkeypatch):
    own = package.RotaryEmbedding

    def other_order(self, positions, q, k):
        return own_forward(self, positions.flip(0), q, k)

    own_forward = own.forward_native
    with monkeypatch.context() as patch:
        patch.setattr(own, "forward_native", other_order)
        refused("RotaryEmbedding to have the rotation.*'-RotaryEmbedding'", made, "RotaryEmbedding")
    with monkeypatch.context() as patch:
        patch.setattr(own, "_compute_cos_sin_cache", lambda self: own_table(self) * 1.01)
        own_table = base.RotaryEmbeddingBase._compute_cos_sin_cache
        refused("RotaryEmbedding to have the table", made, "RotaryEmbedding")
    made("RotaryEmbedding")


def test_an_unknown_class_is_refused_by_name(monkeypatch, vllm_of_one_test):
    class NewRotaryEmbedding(package.RotaryEmbedding):
        pass

    NewRotaryEmbedding.__module__ = base.__name__
    monkeypatch.setattr(base, "NewRotaryEmbedding", NewRotaryEmbedding, raising=False)
    plugin.register()
    arguments = 64, 64, 16, BASE, True, torch.float32
    refused("a rotary class among ApplyRotaryEmb, .*got NewRotary", NewRotaryEmbedding, *arguments)
    vllm_of_one_test.custom_ops.append("-NewRotaryEmbedding")
    assert type(NewRotaryEmbedding(*arguments)) is NewRotaryEmbedding


def test_another_plugin_and_another_vllm_are_refused(monkeypatch):
    class Theirs(package.RotaryEmbedding):
        pass

    custom_op.op_registry_oot["RotaryEmbedding"] = Theirs
    refused("RotaryEmbedding to be vLLM's own, got .*Theirs", plugin.register)
    custom_op.op_registry_oot.clear()
    custom_op.op_registry_oot["YaRNScalingRotaryEmbedding"] = Theirs
    refused("YaRNScalingRotaryEmbedding to be vLLM's own", plugin.register)
    assert custom_op.op_registry_oot.keys() == {"YaRNScalingRotaryEmbedding"}  # no other changed
    monkeypatch.delattr(custom_op.CustomOp, "register_oot")
    refused("CustomOp.register_oot, got .*register_oot", plugin.register)


# -------------------------------------------------------------------------------------- a trainer


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        CLASSES["Llama3RotaryEmbedding"],
        CLASSES["LinearScalingRotaryEmbedding"],
        {k: v for k, v in CLASSES["YaRNScalingRotaryEmbedding"].items() if k != "attention_factor"},
        CLASSES["YaRNScalingRotaryEmbedding"],
    ],
    ids=["default", "llama3", "linear", "yarn", "yarn, attention_factor"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_trainer_and_server_have_the_same_bits(scaling, dtype):
    import transformers

    parameters = {"rope_theta": BASE, **scaling}
    config = transformers.LlamaConfig(
        hidden_size=3 * HEAD_DIM,
        intermediate_size=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=LONGEST,
        rope_parameters=dict(parameters),
    )
    server = package.get_rope(HEAD_DIM, LONGEST, True, parameters, dtype)
    positions = torch.tensor([0, 1, 255, 254, 7, 100, 200])
    q, k = random(7, 3, HEAD_DIM, dtype=dtype), random(7, 1, HEAD_DIM, dtype=dtype, seed=1)
    trained = trainers_rotation(config, q[None], k[None], positions[None])
    for x, y in zip(server(positions, q.clone(), k.clone()), trained, strict=True):
        assert_same_bits(x, y[0])


# -------------------------------------------------------------------------------------- a server

SCALED = {
    "llama3": {**CLASSES["Llama3RotaryEmbedding"], "rope_theta": 100000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 100000.0,
    },
}
SERVER = Path(__file__).with_name("vllm_server.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """SmolLM2-135M-Instruct, and a random model of two layers, as vLLM loads them."""
    folder = tmp_path_factory.mktemp("models")
    gguf = weights.smollm2_gguf(weights.cache_folder(), print)
    models.load_pretrained(str(gguf))[0].save_pretrained(folder / "smollm2")
    models.random_model(layers=2)[0].save_pretrained(folder / "random")
    return folder


def started(jobs, results, plugins=None):
    """A server in a new process, which has the package that is installed, by its entry point."""
    command = [sys.executable, "-P", str(SERVER), json.dumps(jobs), str(results)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")}
    environment |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CACHE_ROOT": str(results.with_suffix(".cache"))}
    log = open(results.with_suffix(".log"), "w+")  # noqa: SIM115
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, cwd=results.parent
    ), log


def finished(process, log, results):
    if process.wait(timeout=1500):
        log.seek(0)
        raise AssertionError(log.read()[-4000:])
    return torch.load(results)


@pytest.fixture(scope="module")
def served(folders):
    """What each engine gives, with the plugin and without."""
    installed = [x for x in entry_points(group="vllm.general_plugins") if x.name == "rope_ext"]
    assert installed, "rope_ext is not installed with its entry point: pip install --no-deps ."
    scaled = {
        name: {"rope_parameters": rope_parameters} for name, rope_parameters in SCALED.items()
    }
    jobs = [["smollm2", {"model": str(folders / "smollm2"), "enforce_eager": True}]] + [
        [name, {"model": str(folders / "random"), "enforce_eager": True, "hf_overrides": overrides}]
        for name, overrides in scaled.items()
    ]
    with_plugin, without = folders / "with.pt", folders / "without.pt"
    both = started(jobs, with_plugin), started(jobs, without, plugins="")
    return [finished(*x, at) for x, at in zip(both, (with_plugin, without), strict=True)]


@pytest.mark.parametrize("name", ["smollm2", *SCALED])
def test_tokens_of_requests_that_come_and_go_are_those_without_the_plugin(served, name):
    ours, own = (results[name] for results in served)
    assert ours["tokens"] == own["tokens"]
    assert sorted(ours["tokens"]) == [0, 1, 3, 4, 5]  # request 2 was aborted
    different = {token for tokens in ours["tokens"].values() for token in tokens}
    assert len(different) > 10
    assert ours["calls"] == ours["layers"] * ours["forwards"] > 0
    assert (ours["own_calls"], own["calls"]) == (0, 0)
    assert own["own_calls"] == own["layers"] * own["forwards"] > 0
    expected = {"smollm2": "", "llama3": "Llama3", "yarn": "YaRNScaling"}[name]
    assert ours["class"] == f"RopeExt{expected}RotaryEmbedding"


@pytest.mark.parametrize("name", ["smollm2", *SCALED])
def test_a_running_server_has_the_bits_of_a_trainer_and_of_the_operators(served, folders, name):
    """Of its own activations: those of the first prompt, and of the last step's requests."""
    import transformers

    folder = folders / ("smollm2" if name == "smollm2" else "random")
    config = transformers.LlamaConfig.from_pretrained(folder)
    if name in SCALED:
        config.rope_parameters = dict(SCALED[name])
    inv_freq, factor = rope_ext.frequencies.from_config(config)
    results = served[0][name]
    table = torch.cat(rope_ext.cos_sin_cache(inv_freq, 200, attention_scaling=factor), -1)
    assert_same_bits(results["table"][:200], table)
    for positions, *given_and_rotated in results["rotated"]:
        shape = len(positions), -1, config.head_dim
        q, k, rotated_q, rotated_k = (x.view(shape) for x in given_and_rotated)
        by_operator = rope_ext.apply_rotary_qk_at(
            q, k, inv_freq, positions, attention_scaling=factor, layout="thd"
        )
        trained = trainers_rotation(config, q[None], k[None], positions[None])
        for server, operator, trainer in zip(
            (rotated_q, rotated_k), by_operator, trained, strict=True
        ):
            assert_same_bits(server, operator)
            assert_same_bits(server, trainer[0])
    assert len(results["rotated"]) == 2


@pytest.mark.slow
def test_a_compiled_model_rotates_by_the_operators(served, folders):
    """By inductor, from a cache of compiled models that has this one without rope_ext."""
    model = str(folders / "random")
    results = folders / "compiled.pt"
    own = finished(*started([["compiled", {"model": model}]], results, plugins=""), results)
    ours = finished(*started([["compiled", {"model": model}]], results), results)
    own, ours = own["compiled"], ours["compiled"]
    assert own["calls"] == 0
    assert ours["calls"] > 0
    assert (ours["own_calls"], ours["calls"] % ours["layers"]) == (0, 0)
    assert ours["tokens"] == own["tokens"]
