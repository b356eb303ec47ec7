"""The models that paged_decode.py serves, and the tokens that transformers generates with them."""

import bench_model
import torch
import transformers
from paged_server import Request
from torch import Tensor, nn

from rope_ext.demo import models

SEED = 0
SMALL = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": None,
}
YARN = {  # of DeepSeek-V3
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

Named = tuple[nn.Module, list[int]]  # a model and a text of tokens


def served(random_layers: int | None, tokens: int) -> dict[str, Named]:
    """SmolLM2 and the others, by their titles, each with a text of so many tokens."""
    smollm2, tokenizer, title = bench_model.load(random_layers)
    others = {"shape of Qwen3": qwen3(), "shape of DeepSeek-V3": deepseek_v3()}
    cpu, of_bytes = torch.device("cpu"), models.ByteTokenizer()
    text = models.text_tokens(tokenizer, tokens, cpu)[0].tolist()
    bytes_of_text = models.text_tokens(of_bytes, tokens, cpu)[0].tolist()
    return {title: (smollm2, text), **{n: (m, bytes_of_text) for n, m in others.items()}}


def qwen3(**sizes: int) -> nn.Module:
    shape = {**SMALL, "num_key_value_heads": 2, "head_dim": 128, **sizes}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return with_random_weights(transformers.Qwen3Config(rope_parameters=rope, **shape))


def deepseek_v3(**sizes: int) -> nn.Module:
    """One dense layer, then layers of experts. The parts of a head have DeepSeek-V3's sizes."""
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    latent = {"q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "v_head_dim": 128}
    shape = {
        **SMALL, **experts, **latent, "qk_rope_head_dim": 64, "moe_intermediate_size": 128,
        "first_k_dense_replace": 1, "num_key_value_heads": None, **sizes,
    }  # fmt: skip
    config = transformers.DeepseekV3Config(
        rope_parameters=YARN, max_position_embeddings=163840, **shape
    )
    return with_random_weights(config)


def with_random_weights(config: transformers.PreTrainedConfig) -> nn.Module:
    """So large that attention, and so the positions, decide the next token."""
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # of a norm
                weight.uniform_(0.5, 1.5, generator=draw)
            else:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5, generator=draw)
    return model


def ends_of(model: nn.Module) -> frozenset[int]:
    """The tokens at which generate stops."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def generated_alone(model: nn.Module, request: Request, system: int) -> list[int]:
    """The tokens from transformers, with its own rotation and cache."""
    if request.system_at is not None:
        return generated_with_mask(model, request, system)
    prompt = torch.tensor([request.prompt], device=model.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


def generated_with_mask(model: nn.Module, request: Request, system: int) -> list[int]:
    """The same where the system prompt of so many tokens does not see the text before it."""
    tokens, ends = list(request.prompt), ends_of(model)
    while len(tokens) < len(request.prompt) + request.new_tokens:
        tokens.append(logits_with_mask(model, tokens, request.system_at, system).argmax().item())
        if tokens[-1] in ends:
            break
    return tokens[len(request.prompt) :]


@torch.inference_mode()
def logits_with_mask(model: nn.Module, tokens: list[int], system_at: int, system: int) -> Tensor:
    """The logits after the last token, [vocabulary]: of a model that reads all tokens at once."""
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    hidden[system_at : system_at + system, :system_at] = True
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    ids, mask = (x.to(model.device) for x in (torch.tensor([tokens]), mask[None, None]))
    return model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[0, -1]
