"""A small Llama, trained from scratch on bytes of a text, then on longer windows by each method."""

import copy
from collections.abc import Callable

import torch
from extension_methods import extended
from torch import Tensor, nn

VOCABULARY = 256  # bytes
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
BASE = 10000.0
TRAINED, EXTENDED = 256, 1024  # bytes of context
BATCH_TOKENS = 2048
LEARNING_RATE, EXTENDING_RATE = 2e-3, 3e-4
WARMUP = 50  # steps
HELD_OUT = 0.1  # of the text: its end
READ_WINDOWS = 24  # of the held-out text, each of EXTENDED bytes


def new_model(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=TRAINED,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": BASE},
            **SHAPE,
        )
    )


def parts(text: Tensor) -> tuple[Tensor, Tensor]:
    """Splits uint8 [bytes] into the training text and the held-out text."""
    end = int(len(text) * (1 - HELD_OUT))
    return text[:end], text[end:]


def train(
    model: nn.Module,
    text: Tensor,
    length: int,
    steps: int,
    rate: float,
    seed: int,
    tick: Callable[[int], object],
) -> None:
    """AdamW on random windows of `length` bytes; the rate rises, then falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, fused=True)
    warmup = min(WARMUP, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
    )
    model.train()
    for _ in range(steps):
        first = torch.randint(len(text) - length, (BATCH_TOKENS // length,), generator=generator)
        windows = text[first[:, None] + torch.arange(length)].long()
        model(windows, labels=windows, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tick(1)
    model.eval()


@torch.inference_mode()
def read_windows(model: nn.Module, text: Tensor) -> Tensor:
    """-log p, float64 [EXTENDED - 1], by position in the window, for windows all over the text."""
    first = torch.linspace(0, len(text) - EXTENDED, READ_WINDOWS).long()
    windows = text[first[:, None] + torch.arange(EXTENDED)].long()
    total = torch.zeros(EXTENDED - 1, dtype=torch.float64)
    for window in windows.split(BATCH_TOKENS // EXTENDED):
        logits = model(window, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none"
        )
        total += losses.view(len(window), -1).sum(0)
    return total / len(windows)


def extend(
    model: nn.Module,
    method: str,
    text: Tensor,
    steps: int,
    seed: int,
    tick: Callable[[int], object],
) -> dict[int, Tensor]:
    """read_windows of the held-out text by a copy of the model: {0: .., steps: ..}, before and
    after so many steps on windows of EXTENDED bytes.
    """
    model = copy.deepcopy(model)
    trained_on, held_out = parts(text)
    with extended(model, method, TRAINED, EXTENDED):
        found = {0: read_windows(model, held_out)}
        train(model, trained_on, EXTENDED, steps, EXTENDING_RATE, seed, tick)
        found[steps] = read_windows(model, held_out)
    return found
