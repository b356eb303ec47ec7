"""A Llama-like model whose rotation is rope_ext's, for the scripts of this folder.

The parameters have the names of Meta's checkpoints, whose pairs are neighbouring channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import rope_ext


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def qkv(self, x: Tensor) -> list[Tensor]:  # [..., dim] -> [..., H, D] each
        return [w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv)]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = rope_ext.apply_rotary_qk(q, k, cos, sin, interleaved=interleaved)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, D]
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int):
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = FeedForward(dim, hidden)


class Llama(nn.Module):
    def __init__(self, vocab=256, dim=64, layers=3, heads=4, kv_heads=2, hidden=176, base=10000.0):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        blocks = (Block(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, vocab, bias=False)
        self.rotary = rope_ext.RotaryEmbedding(dim // heads, base=base, interleaved=True)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = self.rotary.cos_sin(positions[None])  # [1, S, D / 2]: once for all layers
        x = self.tok_embeddings(tokens)  # [B, S, dim]
        for layer in self.layers:
            rows = (cos, sin, self.rotary.interleaved)
            x = x + layer.attention(layer.attention_norm(x), *rows)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return self.output(self.norm(x))
