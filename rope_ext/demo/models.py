"""The model of the demo, pretrained or random, its tokenizer, and text for it to read."""

import inspect
from pathlib import Path

import torch
from torch import nn

# the configuration of SmolLM2-135M
SMOLLM2_SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
RANDOM_SEED = 0
# Twice the usual: attention, and so the positions, then decides the next token. With smaller
# weights the model repeats one token, and the comparison of tokens could not fail.
RANDOM_STD = 0.04


def load_pretrained(path_or_id: str) -> tuple[nn.Module, object]:
    """The float32 model and its tokenizer, from a folder, a .gguf file or an id in the cache.

    Never uses the network. Raises OSError or ValueError, as transformers does, if there is nothing
    to load.
    """
    import transformers

    options, unpack = {"local_files_only": True}, {}
    if path_or_id.endswith(".gguf"):
        file = Path(path_or_id).resolve()
        path_or_id, options["gguf_file"] = str(file.parent), file.name
        if hasattr(transformers, "GgufConfig"):
            # without this, weights may stay packed in layers that can't be trained or saved
            unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # read once for both: reading a GGUF file takes seconds
    options["config"] = transformers.AutoConfig.from_pretrained(path_or_id, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path_or_id, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path_or_id, dtype=torch.float32, **options, **unpack
    )
    return model.eval(), tokenizer


def random_model(layers: int) -> tuple[nn.Module, "ByteTokenizer"]:
    """A Llama of SmolLM2-135M's shape with `layers` layers and seeded random float32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        shape = {"num_hidden_layers": layers, **SMOLLM2_SHAPE}
        model = LlamaForCausalLM(LlamaConfig(initializer_range=RANDOM_STD, **shape))
    return model.float().eval(), ByteTokenizer()


class ByteTokenizer:
    """Replaces a tokenizer: one token a byte, and token numbers instead of text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def real_text() -> str:
    """About 700 kB of English on every machine: Python's own language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some reduced Pythons omit it
        import argparse

        return inspect.getsource(argparse)
    return "\n\n".join(topics[name] for name in sorted(topics))


def chat_tokens(tokenizer, prompt: str, device: torch.device) -> torch.Tensor:
    """The prompt, as a user's message if the model has a chat template -> int64 [1, tokens]."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        # the template has already added the special tokens
        return torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], device=device)
    return torch.tensor([tokenizer.encode(prompt)], device=device)


def text_tokens(tokenizer, length: int, device: torch.device) -> torch.Tensor:
    """Exactly `length` tokens of real text -> int64 [1, length]."""
    text = real_text()
    # 16 characters a token suffice for every tokenizer; tokenizing the whole text would take longer
    tokens = tokenizer.encode(text[: 16 * length])
    while len(tokens) < length:
        tokens = tokens + tokens
    return torch.tensor([tokens[:length]], device=device)
