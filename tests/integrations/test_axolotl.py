"""The plugin of Axolotl: its plugin manager, and trainings by its command."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

pytest.importorskip("axolotl")

import axolotl_training
from axolotl.integrations.base import PluginManager
from support import small_llama

from rope_ext.integrations.transformers import UnrecognizedRotation

PLUGIN = "rope_ext.integrations.axolotl.RopeExtPlugin"
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}
CASES = {"whole model": {}, "LoRA": LORA}
LAYERS = 2


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.setattr(PluginManager, "_instance", None)
    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    assert list(manager.plugins) == [PLUGIN]
    return manager


def test_a_loaded_model_is_patched(plugins):
    model, tokens = small_llama(LAYERS), torch.randint(0, 96, (2, 20))
    expected = model(tokens, labels=tokens)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plugins.post_model_load({}, model)
    with torch.profiler.profile() as profile:
        got = model(tokens, labels=tokens)
    got.loss.backward()
    assert sum(e.count for e in profile.key_averages() if e.key.startswith("rope::")) == LAYERS
    torch.testing.assert_close(got.logits, expected.logits)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_other_kernels_and_unknown_rotations_are_refused(plugins):
    plugin = plugins.plugins[PLUGIN]
    plugin.register({"plugins": [PLUGIN], "liger_rope": False})
    for option in ("liger_rope", "fused_attn_kernel"):
        with pytest.raises(ValueError, match=f"expected {option} to be false.*got True"):
            plugin.register({option: True})
    with pytest.raises(UnrecognizedRotation):
        plugins.post_model_load({}, torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Without the plugin and with it, for each case in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["axolotl_training"])
    train = partial(axolotl_training.train_without_and_with, PLUGIN)
    folders = [tmp_path_factory.mktemp("axolotl") for _ in CASES]
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        runs = list(pool.map(train, folders, CASES.values()))
    return dict(zip(CASES, runs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_command_trains_with_the_losses_and_gradients_of_axolotl(case, trained):
    (own, own_calls), (ours, calls), output = trained[case]
    assert own_calls == 0
    assert calls >= 4 * LAYERS  # steps and layers
    assert f"rope_ext rotates in {LAYERS} modules" in output
    assert len(own) == len(ours) == 4
    for name in ("loss", "grad_norm"):
        expected, got = (torch.tensor([float(log[name]) for log in run]) for run in (own, ours))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
