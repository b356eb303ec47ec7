"""xPos: a rotation whose scores also decay with the distance."""

from torch import Tensor

from rope_ext.frequencies.basic import default
from rope_ext.frequencies.bounds import Device, check_number, check_rotary_dim, exponents


def xpos(
    head_dim: int,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    scale_base: float = 512.0,
    gamma: float = 0.4,
    device: Device = None,
) -> tuple[Tensor, Tensor]:
    """xPos: at position n, q is multiplied by ``z[i] ** (n / scale_base)``, k divided by it.

    z[i] = (2 i / R + gamma) / (1 + gamma), so that the score of two tokens carries
    ``z[i] ** (distance / scale_base)``. The rotation is that of :func:`default`. q and k need
    different tables. Count n from the middle of the context, since the factors leave the range of
    float32 at ``|n|`` of about 35,000 for the default arguments::

        inv_freq, log_scale = frequencies.xpos(64)
        cos, sin = rope_ext.cos_sin(inv_freq, position_ids)                     # [B, S, P]
        scale = torch.exp((position_ids - middle).unsqueeze(-1) * log_scale)    # [B, S, P]
        q = rope_ext.apply_rotary(q, cos * scale, sin * scale)
        k = rope_ext.apply_rotary(k, cos / scale, sin / scale)

    Args:
        head_dim, base, rotary_dim, device: as for :func:`default`.
        scale_base: distance in tokens at which scores have decayed by z; above 0.
        gamma: makes the decays of the pairs more alike; above 0.

    Returns:
        inv_freq, float32 [R / 2], and ``log_scale = ln(z) / scale_base``, float32 [R / 2], at most
        0. There is no attention_scaling that q and k share.

    Raises:
        ValueError: for an argument outside of these bounds.

    Source: A Length-Extrapolatable Transformer, arXiv 2212.10554, section 3.2 and algorithm 1.
    """
    rotary_dim = check_rotary_dim("xpos", head_dim, rotary_dim)
    check_number("xpos", "base", base, above=0)
    check_number("xpos", "scale_base", scale_base, above=0)
    check_number("xpos", "gamma", gamma, above=0)
    inv_freq, _ = default(head_dim, base=base, rotary_dim=rotary_dim, device=device)
    decay = (exponents(rotary_dim, device).double() + gamma) / (1 + gamma)
    return inv_freq, (decay.log() / scale_base).float()
