"""NTK-aware scaling: a larger base for a longer context, which slows low frequencies the most."""

import torch
from torch import Tensor

from rope_ext.frequencies.bounds import (
    LAST_POSITION,
    Device,
    check_integer,
    check_number,
    check_rotary_dim,
    exponents,
    refuse,
)

LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def ntk(
    head_dim: int,
    *,
    alpha: float | None = None,
    factor: float | None = None,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """NTK-aware scaling: :func:`default` with ``base * alpha ** (R / (R - 2))``.

    The lowest frequency is divided by alpha, the highest stays as it is.

    Args:
        head_dim, base, device: as for :func:`default`.
        alpha: how many times longer the context becomes; at least 1.
        factor: another name of alpha, used by many configs. Give one of the two, or equal values.
        rotary_dim: channels that rotate, R: even, 4 <= R <= D. None: all of them.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds, and for a stretched base past float32.

    Source: u/bloc97, "NTK-Aware Scaled RoPE", r/LocalLLaMA 2023; YaRN, arXiv 2309.00071,
    section 3.1. vLLM's rope type "ntk" is another formula: base times factor, and all frequencies
    divided by ``factor ** (2 / R)`` (NTK-RoPE-fixed, kexue.fm/archives/9706).
    """
    if alpha is None and factor is None:
        raise ValueError("frequencies.ntk: expected alpha, or factor as another name, got neither")
    for name, value in (("alpha", alpha), ("factor", factor)):
        if value is not None:
            check_number("ntk", name, value, least=1)
    if None not in (alpha, factor) and alpha != factor:
        refuse("ntk", "factor", f"alpha, {alpha:g}", factor)
    alpha = factor if alpha is None else alpha
    return _stretched("ntk", head_dim, alpha, base, rotary_dim, device)


def ntk_alpha(
    head_dim: int,
    *,
    alpha: float,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """:func:`ntk` under the name that transformers gives to it in Hunyuan's models.

    :func:`default` with ``base * alpha ** (R / (R - 2))``. Their config.json has rope type
    "dynamic" with an alpha; the length of the sequence has no effect.

    Args:
        head_dim, alpha, base, rotary_dim, device: as for :func:`ntk`.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: compute_ntk_alpha_rope_parameters of transformers, modeling_hunyuan_v1_dense.py.
    """
    return _stretched("ntk_alpha", head_dim, alpha, base, rotary_dim, device)


def _stretched(
    function: str,
    head_dim: int,
    alpha: float,
    base: float,
    rotary_dim: int | None,
    device: Device,
) -> tuple[Tensor, float]:
    rotary_dim = check_rotary_dim(function, head_dim, rotary_dim, least=4)
    check_number(function, "alpha", alpha, least=1)
    check_number(function, "base", base, above=0)
    stretched = _stretched_base(function, base, alpha, rotary_dim)
    return 1.0 / (stretched ** exponents(rotary_dim, device)), 1.0


def _stretched_base(function: str, base: float, alpha: float, rotary_dim: int) -> float:
    stretched = base * alpha ** (rotary_dim / (rotary_dim - 2))
    if stretched > LARGEST_FLOAT32:
        refuse(
            function,
            "the stretched base, base * alpha ** (R / (R - 2)),",
            f"at most {LARGEST_FLOAT32:.3g}",
            stretched,
        )
    return stretched


def dynamic_ntk(
    head_dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    length: int | Tensor | None = None,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """NTK-aware scaling by the length of the sequence.

    :func:`ntk` with ``alpha = factor * L / O - (factor - 1)``, where O is
    original_max_position_embeddings and L the length, but at least O. So up to O tokens the
    frequencies are those of :func:`default`.

    Args:
        head_dim, base: as for :func:`default`.
        device: as for :func:`default`. None: the device of length, if it is a tensor.
        factor: how fast the context is stretched; at least 1 and below 2^31.
        original_max_position_embeddings: the longest sequence of the training, in tokens, O.
            In transformers max_position_embeddings of the config.
        length: of the sequence, in tokens; 0 or more. An integer tensor of any shape stays on its
            device, and the host does not wait for it. None: O.
        rotary_dim: channels that rotate, R: even, 4 <= R <= D. None: all of them.

    Returns:
        inv_freq, float32 [R / 2], for a tensor ``[*length.shape, R / 2]``; attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds, and for a base that a sequence of 2^31
            tokens stretches past float32.

    Source: u/emozilla, "Dynamically Scaled RoPE", r/LocalLLaMA 2023; YaRN, arXiv 2309.00071,
    section 3.3; rope type "dynamic" of transformers.
    """
    rotary_dim = check_rotary_dim("dynamic_ntk", head_dim, rotary_dim, least=4)
    check_number("dynamic_ntk", "factor", factor, least=1, most=LAST_POSITION)
    check_number("dynamic_ntk", "base", base, above=0)
    original = original_max_position_embeddings
    check_integer("dynamic_ntk", "original_max_position_embeddings", original)
    alpha = factor * 2**31 / original - (factor - 1)  # for the longest possible sequence
    _stretched_base("dynamic_ntk", base, alpha, rotary_dim)
    if isinstance(length, Tensor):
        if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            raise ValueError(
                "frequencies.dynamic_ntk: expected length to be an integer or a tensor of them, "
                f"got {length.dtype}"
            )
        powers = exponents(rotary_dim, length.device if device is None else device)
        length = length.clamp(min=original)
        return stretched_by(length, powers, factor=factor, original=original, base=base), 1.0
    if length is not None:
        check_integer("dynamic_ntk", "length", length, least=0, most=2**31)
    longest = original if length is None else max(length, original)
    alpha = factor * longest / original - (factor - 1)
    stretched = _stretched_base("dynamic_ntk", base, alpha, rotary_dim)
    return 1.0 / (stretched ** exponents(rotary_dim, device)), 1.0


def stretched_by(
    length: Tensor, exponents: Tensor, *, factor: float, original: int, base: float
) -> Tensor:
    """inv_freq [*length.shape, P] of dynamic_ntk, for lengths of at least original. No checks."""
    rotary_dim = 2 * exponents.shape[-1]
    times = length * factor if isinstance(factor, int) else length.float() * factor
    alpha = times.float() / original - (factor - 1)
    stretched = base * alpha ** (rotary_dim / (rotary_dim - 2))
    return (stretched.unsqueeze(-1) ** exponents).reciprocal()
