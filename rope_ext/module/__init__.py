"""RotaryEmbedding: frequencies, tables and rotation as one ``torch.nn.Module``."""

from rope_ext.module.rotary_embedding import RotaryEmbedding

__all__ = ["RotaryEmbedding"]
