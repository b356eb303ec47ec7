"""The rotations of a trainer and of a server have the same bits, on every device.

The trainer is a patched transformers model: rows of cos and sin for a batch of sequences, one angle
a channel, heads before tokens. The server has packed tokens of many requests at positions of their
own, q and k side by side in one tensor, a table of all positions, and rotates in place, as
vLLM with the plugin does, which tests/integrations/test_vllm.py runs.
"""

import pytest
import torch
from support import assert_same_bits, name_of, random, rounded_once

transformers = pytest.importorskip("transformers")

from trainers_rotation import trainers_rotation  # noqa: E402

import rope_ext  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, LONGEST = 4, 2, 64, 4096
POSITIONS = torch.tensor([0, 1, 2, 777, 778, 31, 4095, 4094, 5, 1000, 1001, 3333])
SCALINGS = {
    "default": {"rope_type": "default"},
    "llama3": {  # three ranges of frequencies
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {  # a factor on cos and sin
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def config_of(scaling):
    return transformers.LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=8,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_trainer_server_and_the_cpu_rotate_with_the_same_bits(device, scaling, dtype):
    config = config_of(scaling)
    inv_freq, factor = rope_ext.frequencies.from_config(config)
    qkv = random(len(POSITIONS), (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    sizes = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    heads = [x.unflatten(1, (-1, HEAD_DIM)) for x in qkv.split(sizes, 1)[:2]]
    tables = rope_ext.cos_sin_cache(inv_freq, LONGEST, attention_scaling=factor)
    expected = [rounded_once(x, *tables, POSITIONS) for x in heads]  # on the CPU, in plain PyTorch

    positions = POSITIONS.to(device)
    on_device = rope_ext.cos_sin_cache(inv_freq.to(device), LONGEST, attention_scaling=factor)
    cos, sin = torch.cat(on_device, -1).chunk(2, -1)
    q, k, _ = (x.unflatten(1, (-1, HEAD_DIM)) for x in qkv.to(device).split(sizes, 1))
    given = [x[None].clone() for x in (q, k)]
    rope_ext.apply_rotary_qk(q, k, cos, sin, positions, layout="thd", inplace=True)
    trained = trainers_rotation(config, *given, positions[None])
    for name, x, server, trainer in zip("qk", expected, (q, k), trained, strict=True):
        assert_same_bits(server, x, f"server, {name}")
        assert_same_bits(trainer[0], x, f"trainer, {name}")
