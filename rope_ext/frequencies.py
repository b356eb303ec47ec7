"""Frequencies: one function a method, each returning ``(inv_freq, attention_scaling)``.

``inv_freq`` is float32 [P] in radians per token, the value that models were trained with;
``attention_scaling`` is the factor that the method multiplies into cos and sin.
"""

import torch
from torch import Tensor


def default(
    head_dim: int,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """The frequencies of RoFormer: ``inv_freq[i] = base ** (-2 i / R)``.

    Args:
        head_dim: channels of a head, D.
        base: the longest wavelength is 2 pi base tokens, nearly. Often called rope_theta.
        rotary_dim: channels that rotate, R: even, 2 <= R <= D. None: all of them.
        device: where to make inv_freq.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for a rotary_dim or base outside of these bounds.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2. Evaluated in float32 in the
    order of transformers, so that the bits are those of its ``ROPE_INIT_FUNCTIONS``.
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"frequencies.default: expected rotary_dim to be even, at least 2 and at most head_dim "
            f"{head_dim}, got {rotary_dim}"
        )
    if not base > 0:
        raise ValueError(f"frequencies.default: expected base to be above 0, got {base}")
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float() / rotary_dim
    return 1.0 / (base**exponent), 1.0
