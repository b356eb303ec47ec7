"""Runs weights in Meta's format, and the same weights in transformers: the logits are equal.

    python examples/meta_weights.py [--folder Llama3.1-8B]

The folder has consolidated.00.pth and params.json. Without one, random weights are saved in this
format and loaded. Meta's weights have neighbouring channels as pairs (`interleaved=True`), those on
Hugging Face have halves: the rows of wq and wk are in another order.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from llama import Llama
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rope_ext
from rope_ext.integrations.reference_apis import llama as meta

# What use_scaled_rope of params.json stands for, in Llama 3.1.
SCALED = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
SCALED |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Parameters of transformers, and Meta's.
NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
OF_LAYERS = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"}
OF_LAYERS |= {"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo"}
OF_LAYERS |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
OF_LAYERS |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm"}
OF_LAYERS |= {"post_attention_layernorm": "ffn_norm"}


def save_random(folder: Path) -> None:
    torch.manual_seed(0)
    model = Llama(vocab=512, dim=128, layers=2, base=500000.0)
    for parameter in model.parameters():
        parameter.data *= 2  # attention that depends on positions
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    params = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512}
    params |= {"rope_theta": 500000.0, "use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps(params))


def load(folder: Path) -> tuple[Llama, dict[str, Tensor], dict]:
    weights = torch.load(folder / "consolidated.00.pth", mmap=True, weights_only=True)
    params = json.loads((folder / "params.json").read_text())
    sizes = {"vocab": params["vocab_size"], "dim": params["dim"], "layers": params["n_layers"]}
    sizes |= {"heads": params["n_heads"], "kv_heads": params["n_kv_heads"]}
    sizes["hidden"] = len(weights["layers.0.feed_forward.w1.weight"])
    model = Llama(**sizes)
    model.load_state_dict(weights, strict=False)  # older files have a rope.freqs, which follows
    scaling = SCALED if params.get("use_scaled_rope") else None
    rotary = {"base": params["rope_theta"], "scaling": scaling, "interleaved": True}
    model.rotary = rope_ext.RotaryEmbedding(params["dim"] // params["n_heads"], **rotary)
    return model, weights, {**params, "hidden": sizes["hidden"], "scaling": scaling}


def halves(weight: Tensor, heads: int) -> Tensor:
    """wq or wk [heads D, dim] with the pairs of each head as halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def in_transformers(weights: dict[str, Tensor], params: dict) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["hidden"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]}
        | (params["scaling"] or {}),
    )
    state = {f"{name}.weight": weights[f"{of_meta}.weight"] for name, of_meta in NAMES.items()}
    heads = {"attention.wq": params["n_heads"], "attention.wk": params["n_kv_heads"]}
    for layer in range(params["n_layers"]):
        for name, of_meta in OF_LAYERS.items():
            weight = weights[f"layers.{layer}.{of_meta}.weight"]
            weight = halves(weight, heads[of_meta]) if of_meta in heads else weight
            state[f"model.layers.{layer}.{name}.weight"] = weight
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of a checkpoint from Meta, in one file")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            save_random(folder := Path(temporary))
        model, weights, params = load(folder)
    tokens = torch.randint(
        params["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(1)
    )
    logits = model(tokens)
    off = (in_transformers(weights, params)(tokens).logits - logits).abs().max()
    model.rotary.interleaved = False  # the mistake that raises nothing
    mistake = (model(tokens) - logits).abs().max()

    q, k, _ = model.layers[0].attention.qkv(model.tok_embeddings(tokens))
    rows = model.rotary.cos_sin(torch.arange(64)[None])
    ours = rope_ext.apply_rotary_qk(q, k, *rows, interleaved=True)
    same = all(map(torch.equal, meta.apply_rotary_emb(q, k, torch.complex(*rows)), ours))
    print(
        f"Shown: logits up to {logits.abs().max():.2f} in Meta's order and in transformers' differ"
    )
    print(f"by {off:.1e}; with the wrong order by {mistake:.2f}, and nothing raises.")
    print(f"Meta's apply_rotary_emb with freqs_cis, of rope_ext: the same bits, {same}.")


if __name__ == "__main__":
    main()
