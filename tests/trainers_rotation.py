"""The rotation in a training loop: that of a Llama of transformers, patched with exact tables."""

import copy

import torch
from torch import nn

from rope_ext.integrations.transformers import patch


class _Given(nn.Module):
    """Replaces a projection of hidden states by a given tensor."""

    def __init__(self, projected):
        super().__init__()
        self.projected = projected

    def forward(self, hidden_states):
        return self.projected


def trainers_rotation(config, q, k, position_ids):
    """What the attention of a patched model has for q [1, S, H, D] and k, position_ids [1, S]."""
    import transformers

    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.transpose(1, 2), key.transpose(1, 2)))
        return value.transpose(1, 2), None

    transformers.AttentionInterface.register("kept for a test", attention)
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    model = transformers.LlamaModel(config).to(q.device)
    patch(model, tables=True)
    layer = model.layers[0].self_attn
    layer.config._attn_implementation = "kept for a test"
    layer.q_proj, layer.k_proj, layer.v_proj = (_Given(x.flatten(2)) for x in (q, k, k))
    layer.o_proj = nn.Identity()
    hidden = torch.zeros(*q.shape[:2], config.hidden_size, dtype=q.dtype, device=q.device)
    layer(hidden, position_embeddings=model.rotary_emb(hidden, position_ids), attention_mask=None)
    return seen[0]
