"""Frequencies for contexts longer than the training's: variants of interpolation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rope_ext.frequencies.bounds import (
    Device,
    check_factors,
    check_integer,
    check_number,
    check_rotary_dim,
    exponents,
    refuse,
    shown,
)


def linear(
    head_dim: int,
    *,
    factor: float,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """Position interpolation: ``inv_freq[i] = base ** (-2 i / R) / factor``.

    Args:
        head_dim, base, rotary_dim, device: as for :func:`default`.
        factor: how many times longer the context becomes; at least 1.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: Position Interpolation, arXiv 2306.15595, equation 4.
    """
    rotary_dim = check_rotary_dim("linear", head_dim, rotary_dim)
    check_number("linear", "factor", factor, least=1)
    check_number("linear", "base", base, above=0)
    return 1.0 / (base ** exponents(rotary_dim, device)) / factor, 1.0


def yarn(
    head_dim: int,
    *,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    max_position_embeddings: int | None = None,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    low: float | None = None,
    high: float | None = None,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    device: Device = None,
) -> tuple[Tensor, float]:
    """YaRN: fast pairs are kept, slow ones are interpolated, pairs between are mixed by a ramp.

    With ``w[i] = base ** (-2 i / R)`` and O the original_max_position_embeddings, pair i makes
    ``O w[i] / (2 pi)`` turns in the original context. The pair that makes r turns is
    ``i(r) = R ln(O / (2 pi r)) / (2 ln base)``. The ramp g[i] rises from 0 at low to 1 at high, and
    ``inv_freq = w / factor * g + w * (1 - g)``. low is i(beta_fast) and high is i(beta_slow), both
    clamped to [0, R - 1], unless both are given.

    attention_scaling is attention_factor if given; else, with ``m(s) = 0.1 s ln(factor) + 1``,
    ``m(mscale) / m(mscale_all_dim)`` where both are given and not 0; else ``m(1)``. Models in the
    style of DeepSeek-V3 also multiply the scale of their softmax by ``m(mscale_all_dim) ** 2``:
    that belongs to attention, not to the rotation.

    Args:
        head_dim, base, rotary_dim, device: as for :func:`default`; base above 1.
        factor: how many times longer the context becomes; at least 1. None:
            max_position_embeddings / O, as in transformers: below O, slow pairs become faster.
        original_max_position_embeddings: the longest sequence of the training, in tokens, O. Not
            needed if factor, low and high are given.
        max_position_embeddings: the longest sequence, in tokens; only for a factor of None.
        beta_fast: turns in O tokens from which a pair stays as it is; above 0. None: 32.
        beta_slow: turns in O tokens up to which a pair is interpolated; above 0, at most beta_fast.
            None: 1.
        low, high: the ends of the ramp in pairs, need not be whole, low at most high. Both are
            given, or none; they replace beta_fast and beta_slow.
        attention_factor: factor on cos and sin; above 0.
        mscale, mscale_all_dim: see above; 0 or more. One alone is without effect.
        truncate: round low and high, if they follow from beta_fast and beta_slow, outwards to whole
            pairs.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: YaRN, arXiv 2309.00071, definitions 1 and 2, section 3.4; for mscale and truncate, rope
    type "yarn" of transformers; for low and high, TensorRT-LLM's fused_qk_norm_rope
    (fusedQKNormRopeKernel.cu, compute_freq_yarn) and SGLang.
    """
    rotary_dim = check_rotary_dim("yarn", head_dim, rotary_dim)
    check_number("yarn", "base", base, above=1)
    original = original_max_position_embeddings
    if original is not None:
        check_integer("yarn", "original_max_position_embeddings", original)
    elif factor is None or (low is None and high is None):
        raise ValueError(
            "frequencies.yarn: expected original_max_position_embeddings, or factor, low and high, "
            "got neither"
        )
    if factor is not None:
        check_number("yarn", "factor", factor, least=1)
    elif max_position_embeddings is not None:
        check_integer("yarn", "max_position_embeddings", max_position_embeddings)
        factor = max_position_embeddings / original
    else:
        raise ValueError(
            "frequencies.yarn: expected factor, or max_position_embeddings that it follows from, "
            "got neither"
        )
    if not isinstance(truncate, bool):
        refuse("yarn", "truncate", "a bool", truncate)
    for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
        if value is not None:
            check_number("yarn", name, value, least=0)
    low, high = (
        _ramp_of_turns(rotary_dim, base, original, beta_fast, beta_slow, truncate)
        if low is None and high is None
        else _given_ramp(low, high, beta_fast, beta_slow)
    )
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    wavelengths = base ** exponents(rotary_dim, device)
    # Same bits as transformers: 1 - kept instead of the ramp, and factor * wavelengths first.
    inv_freq = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

    if attention_factor is not None:
        check_number("yarn", "attention_factor", attention_factor, above=0)
        return inv_freq, float(attention_factor)

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return inv_freq, growth(mscale) / growth(mscale_all_dim)
    return inv_freq, growth(1)


def _ramp_of_turns(
    rotary_dim: int,
    base: float,
    original: int,
    beta_fast: float | None,
    beta_slow: float | None,
    truncate: bool,
) -> tuple[float, float]:
    """low and high: the pairs that make beta_fast and beta_slow turns."""
    beta_slow = 1.0 if beta_slow is None else beta_slow
    beta_fast = 32.0 if beta_fast is None else beta_fast
    check_number("yarn", "beta_slow", beta_slow, above=0)
    check_number("yarn", "beta_fast", beta_fast, above=0)
    if beta_fast < beta_slow:
        refuse("yarn", "beta_fast", f"at least beta_slow {beta_slow:g}", beta_fast)

    def pair_that_turns(times: float) -> float:
        return (rotary_dim * math.log(original / (times * 2 * math.pi))) / (2 * math.log(base))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, rotary_dim - 1)


def _given_ramp(
    low: float | None, high: float | None, beta_fast: float | None, beta_slow: float | None
) -> tuple[float, float]:
    """low and high as given, checked."""
    if beta_fast is not None or beta_slow is not None:
        raise ValueError(
            "frequencies.yarn: expected either low and high or beta_fast and beta_slow, got both"
        )
    check_number("yarn", "low", low)
    check_number("yarn", "high", high, least=low)
    return low, high


def longrope(
    head_dim: int,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: int,
    factor: float | None = None,
    length: int | None = None,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    attention_factor: float | None = None,
    short_mscale: float | None = None,
    long_mscale: float | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """LongRoPE: ``inv_freq[i] = base ** (-2 i / R) / f[i]`` with a factor for each pair.

    f is long_factor for sequences of more than O = original_max_position_embeddings tokens, else
    short_factor. attention_scaling is long_mscale or short_mscale, by the same rule, if given;
    else attention_factor if given; else ``sqrt(1 + ln(factor) / ln(O))``.

    Args:
        head_dim, base, rotary_dim, device: as for :func:`default`.
        short_factor, long_factor: R / 2 positive numbers each.
        original_max_position_embeddings: the longest sequence of the training, in tokens, O; at
            least 2.
        factor: how many times longer the context becomes; at least 1. Only for attention_scaling,
            so not needed if that is given. In transformers max_position_embeddings / O.
        length: of the sequence, in tokens; 0 or more. None: at most O.
        attention_factor: factor on cos and sin; above 0.
        short_mscale, long_mscale: factor on cos and sin for short and long sequences
            (Phi-3.5-MoE); both or none.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: LongRoPE, arXiv 2402.13753, section 3; rope type "longrope" of transformers, for the
    attention factor of Phi-3, arXiv 2404.14219.
    """
    rotary_dim = check_rotary_dim("longrope", head_dim, rotary_dim)
    check_number("longrope", "base", base, above=0)
    original = original_max_position_embeddings
    check_integer("longrope", "original_max_position_embeddings", original, least=2)
    check_factors("longrope", "short_factor", short_factor, rotary_dim // 2)
    check_factors("longrope", "long_factor", long_factor, rotary_dim // 2)
    if length is not None:
        check_integer("longrope", "length", length, least=0, most=2**31)
    is_long = length is not None and length > original
    factors = torch.tensor(
        long_factor if is_long else short_factor, dtype=torch.float32, device=device
    )
    inv_freq = 1.0 / (factors * base ** exponents(rotary_dim, device))

    if (short_mscale is None) != (long_mscale is None):
        raise ValueError(
            "frequencies.longrope: expected short_mscale and long_mscale together, got "
            f"{shown(short_mscale)} and {shown(long_mscale)}"
        )
    for name, value in (
        ("short_mscale", short_mscale),
        ("long_mscale", long_mscale),
        ("attention_factor", attention_factor),
    ):
        if value is not None:
            check_number("longrope", name, value, above=0)
    if factor is not None:
        check_number("longrope", "factor", factor, least=1)
    if short_mscale is not None and long_mscale is not None:
        return inv_freq, float(long_mscale if is_long else short_mscale)
    if attention_factor is not None:
        return inv_freq, float(attention_factor)
    if factor is None:
        raise ValueError(
            "frequencies.longrope: expected factor or attention_factor, which attention_scaling "
            "follows from, got neither"
        )
    return inv_freq, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def llama3(
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """Llama 3.1: slow pairs are interpolated, fast ones are kept, pairs between are mixed.

    Pair i has ``w[i] = base ** (-2 i / R)`` and makes ``t = O w[i] / (2 pi)`` turns in the original
    context of O tokens. It becomes w / factor for t < low_freq_factor, stays w for
    t > high_freq_factor, and between is ``(1 - s) w / factor + s w`` with
    ``s = (t - low_freq_factor) / (high_freq_factor - low_freq_factor)``.

    Args:
        head_dim, base, rotary_dim, device: as for :func:`default`.
        factor: how many times longer the context becomes; at least 1.
        low_freq_factor: turns in O tokens up to which a pair is interpolated; above 0.
        high_freq_factor: turns in O tokens from which a pair is kept; above low_freq_factor.
        original_max_position_embeddings: the longest sequence of the training, in tokens, O.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: meta-llama/llama-models, models/llama3/model.py; rope type "llama3" of transformers.
    """
    rotary_dim = check_rotary_dim("llama3", head_dim, rotary_dim)
    check_number("llama3", "factor", factor, least=1)
    check_number("llama3", "base", base, above=0)
    check_number("llama3", "low_freq_factor", low_freq_factor, above=0)
    check_number("llama3", "high_freq_factor", high_freq_factor, above=low_freq_factor)
    original = original_max_position_embeddings
    check_integer("llama3", "original_max_position_embeddings", original)
    inv_freq = 1.0 / (base ** exponents(rotary_dim, device))
    wavelengths = 2 * math.pi / inv_freq
    slow = wavelengths > original / low_freq_factor
    fast = wavelengths < original / high_freq_factor
    share = (original / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - share) * inv_freq / factor + share * inv_freq
    return torch.where(slow, inv_freq / factor, torch.where(fast, inv_freq, between)), 1.0
