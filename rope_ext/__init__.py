"""Rotary position embeddings (RoPE) for PyTorch: exact, differentiable, compiled for CPU and CUDA.

The operators are ``torch.ops.rope.*``; the functions here add layouts and in-place autograd.
Words: B batch, S sequence, H heads, D head_dim, T tokens of a packed batch, R rotary_dim (the
channels that rotate), P = R / 2 pairs, L rows of a cos/sin table. Positions count tokens, angles are
radians.
"""

import torch  # noqa: F401  (its libraries must be loaded before _C)

try:
    from rope_ext import _C
except ImportError as error:
    raise ImportError(
        "rope_ext is not built here: its compiled part rope_ext._C could not be loaded "
        f"({error}). In a clone of the repository run 'pip install -e .'; elsewhere "
        "'pip install rope_ext'."
    ) from error

from rope_ext import _register, frequencies, reference
from rope_ext.embedding import RotaryEmbedding
from rope_ext.ops import apply_rotary, apply_rotary_qk, cos_sin, cos_sin_cache

_register.register()

__version__: str = _C.build_info()["version"]

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_qk",
    "cos_sin",
    "cos_sin_cache",
    "frequencies",
    "reference",
]
