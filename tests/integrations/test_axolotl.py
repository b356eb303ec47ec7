"""The plugin of Axolotl: its plugin manager, and trainings by its command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("axolotl")

import axolotl_training
from axolotl.integrations.base import PluginManager
from support import small_llama

from rope_ext.integrations.transformers import UnrecognizedRotation

PLUGIN = "rope_ext.integrations.axolotl.RopeExtPlugin"
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}
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


@pytest.mark.parametrize("case", [{}, LORA], ids=["whole model", "LoRA"])
def test_command_trains_with_the_losses_and_gradients_of_axolotl(case, tmp_path):
    """Without the plugin, then with it: it stays registered in the process."""
    axolotl_training.write_model(tmp_path)
    configs = [
        axolotl_training.write_config(tmp_path, name, plugins, **case)
        for name, plugins in (("own", ()), ("ours", (PLUGIN,)))
    ]
    paths = Path(__file__).parents[2], Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths))}
    environment |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    command = [sys.executable, axolotl_training.__file__, *configs]
    done = subprocess.run(command, **options, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    own, ours = json.loads(line.removeprefix("RESULT "))
    assert own["calls"] == 0
    assert ours["calls"] >= 4 * LAYERS  # steps and layers
    assert f"rope_ext rotates in {LAYERS} modules" in done.stdout + done.stderr
    for name in ("loss", "grad_norm"):
        expected, got = ([float(log[name]) for log in run["logs"]] for run in (own, ours))
        assert len(expected) == 4
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)
