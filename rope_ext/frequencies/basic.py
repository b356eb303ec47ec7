"""Frequencies without an extension of the context, for all channels or some of them."""

from torch import Tensor
from torch.nn.functional import pad

from rope_ext.frequencies.bounds import Device, check_number, check_rotary_dim, exponents


def default(
    head_dim: int,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    device: Device = None,
) -> tuple[Tensor, float]:
    """The frequencies of RoFormer: ``inv_freq[i] = base ** (-2 i / R)``.

    Args:
        head_dim: channels of a head, D.
        base: the longest wavelength is about 2 pi base tokens. Above 0. Often called rope_theta.
        rotary_dim: channels that rotate, R: even, 2 <= R <= D. None: all of them.
        device: where to make inv_freq.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for a rotary_dim or base outside of these bounds.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2.
    """
    rotary_dim = check_rotary_dim("default", head_dim, rotary_dim)
    check_number("default", "base", base, above=0)
    return 1.0 / (base ** exponents(rotary_dim, device)), 1.0


def partial(
    head_dim: int, *, rotary_pct: float, base: float = 10000.0, device: Device = None
) -> tuple[Tensor, float]:
    """The frequencies of GPT-NeoX: :func:`default` for ``R = int(D * rotary_pct)`` channels.

    The other channels do not rotate: the operators leave those past R as they are. Not to be
    confused with :func:`proportional`, which spreads the frequencies over all of D.

    Args:
        head_dim, base, device: as for :func:`default`.
        rotary_pct: the part of a head that rotates, above 0 and at most 1. In transformers
            ``partial_rotary_factor``.

    Returns:
        inv_freq, float32 [R / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for a rotary_pct outside of these bounds, or one that leads to an odd R.

    Source: GPT-NeoX-20B, arXiv 2204.06745, section 2.1.
    """
    check_number("partial", "rotary_pct", rotary_pct, above=0, most=1)
    rotary_dim = check_rotary_dim("partial", head_dim, int(head_dim * rotary_pct))
    return default(head_dim, base=base, rotary_dim=rotary_dim, device=device)


def proportional(
    head_dim: int,
    *,
    partial_rotary_factor: float = 1.0,
    factor: float = 1.0,
    base: float = 10000.0,
    device: Device = None,
) -> tuple[Tensor, float]:
    """The frequencies of Gemma 4: ``base ** (-2 i / D) / factor`` for the first pairs, then zeros.

    The first ``int(partial_rotary_factor * D // 2)`` pairs have the frequencies that they have when
    all of the head rotates; the others have the frequency 0, which is no rotation.

    Args:
        head_dim: channels of a head, D: even, at least 2.
        partial_rotary_factor: the part of the pairs that rotates, 0 to 1.
        factor: positions are divided by it; at least 1.
        base, device: as for :func:`default`.

    Returns:
        inv_freq, float32 [D / 2], and attention_scaling, 1.0.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: rope type "proportional" of transformers, modeling_rope_utils.py.
    """
    check_rotary_dim("proportional", head_dim, None)
    check_number("proportional", "partial_rotary_factor", partial_rotary_factor, least=0, most=1)
    check_number("proportional", "factor", factor, least=1)
    check_number("proportional", "base", base, above=0)
    rotated = int(partial_rotary_factor * head_dim // 2)
    # the whole range at once, as in transformers: the last bit of some powers depends on it
    inv_freq = 1.0 / (base ** exponents(2 * rotated, device, head_dim))
    return pad(inv_freq, (0, head_dim // 2 - rotated)) / factor, 1.0
