"""Fine-tuning a patched SmolLM2-135M in bfloat16, with activation checkpointing."""

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")

from rope_ext.demo import weights  # noqa: E402
from rope_ext.demo.models import load_pretrained, text_tokens  # noqa: E402
from rope_ext.integrations.transformers import patch  # noqa: E402

STEPS, TOKENS, LEARNING_RATE = 20, 8, 1e-4  # few tokens: emulated bfloat16 is slow

# The tolerance is the change of the unpatched model's losses when its attention is computed by
# another of transformers' implementations, which are equal up to rounding. The patched model may
# differ as much; both are maxima over 20 steps, hence the factor.
NOISE_FACTOR = 2


@pytest.fixture(scope="module")
def loaded():
    try:
        gguf = weights.smollm2_gguf(weights.cache_folder(), print)
    except weights.DownloadFailed as error:
        pytest.skip(f"SmolLM2 is not in the cache and can't be fetched: {error}")
    return load_pretrained(str(gguf))


def losses(loaded, *, attention, patched):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    for parameter in model.parameters():  # not inv_freq, like from_pretrained(dtype=...)
        parameter.data = parameter.data.bfloat16()
    model.set_attn_implementation(attention)
    if patched:
        patch(model)
    with warnings.catch_warnings():  # the argument has another name in the newest transformers
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    model.train()
    batch = text_tokens(tokenizer, TOKENS, torch.device("cpu")).view(1, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    curve = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach().double())
    return torch.stack(curve)


@pytest.mark.slow
def test_the_loss_curve_over_20_steps_is_that_of_the_unpatched_model(loaded):
    unpatched = losses(loaded, attention="sdpa", patched=False)
    noise = (losses(loaded, attention="eager", patched=False) - unpatched).abs().max()
    moved = (losses(loaded, attention="sdpa", patched=True) - unpatched).abs().max()
    print(f"loss {unpatched[0]:.3f} to {unpatched[-1]:.3f}; moved {moved:.4f}, noise {noise:.4f}")
    assert unpatched[-5:].mean() < unpatched[:5].mean()  # it learns
    assert moved <= NOISE_FACTOR * noise
