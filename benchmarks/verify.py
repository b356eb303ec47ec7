"""Compares rotations and tables with float64 before they are timed."""

import torch
from torch import Tensor

from rope_ext import reference

# In units of eps of the dtype, relative to a pair's length. Rounding the result is 0.5. The rounded
# table is 0.71, products 0.71 and a sum 0.5: in float32 for rope_ext, in the dtype for others. The
# total is below 2 for float32; 3 leaves room for one more rounding in other libraries.
OURS_SLACK, PEERS_SLACK = 2.0, 3.0
STEPS_SLACK = 8.0  # for several steps that round to the dtype, relative to the largest result
CHUNK = 256  # tokens rotated in float64 at a time
SAMPLE = 512  # tokens of a sample


class WrongResult(Exception):
    """The message names the tensor and its error."""


def check_rotation(
    name: str,
    got: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    slack: float,
    interleaved: bool = False,
    inverse: bool = False,
    sample: bool = False,
) -> None:
    """Raises WrongResult unless got is x rotated by the angles of cos and sin.

    Args:
        name: of got, for the message.
        got, x: [B, S, H, D].
        cos, sin: float64 [1|B, S, P], exact.
        slack: allowed error, relative to the length of a pair before its rotation.
        sample: check SAMPLE tokens of each sequence, including the first and the last.
    """
    if got.shape != x.shape or got.dtype != x.dtype:
        raise WrongResult(f"{name} is {got.dtype} {list(got.shape)}, {x.dtype} {list(x.shape)}")
    seq, dim = x.shape[1], 2 * cos.shape[-1]
    tokens = torch.arange(seq)
    if sample and seq > SAMPLE:
        tokens = torch.linspace(0, seq - 1, SAMPLE, dtype=torch.float64).round().long()
    for chunk in tokens.split(CHUNK):
        before = x[:, chunk].double()
        exact = reference.apply_rotary(
            before, cos[:, chunk], sin[:, chunk], interleaved=interleaved, inverse=inverse
        )
        error = (got[:, chunk].double() - exact).abs()
        allowed = slack * pair_lengths(before, dim, interleaved)
        if not (error <= allowed).all():
            over = (error / allowed.clamp_min(1e-300)).max().item()
            raise WrongResult(f"{name} is wrong: error {over:.3g} times what is allowed")


def pair_lengths(x: Tensor, dim: int, interleaved: bool) -> Tensor:
    """For each channel the length of its pair; 0 for channels past dim, which do not rotate."""
    lengths = torch.zeros_like(x)
    turned = x[..., :dim]
    if interleaved:
        length = torch.hypot(turned[..., 0::2], turned[..., 1::2])
        lengths[..., :dim] = length.repeat_interleave(2, -1)
    else:
        first, second = turned.chunk(2, -1)
        lengths[..., :dim] = torch.hypot(first, second).repeat(*[1] * (x.dim() - 1), 2)
    return lengths


def exact_rows(inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 cos and sin [*positions.shape, P]."""
    return reference.cos_sin(inv_freq, positions)


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of dtype at exact float64 values."""
    exponent = torch.frexp(exact.abs()).exponent
    info = torch.finfo(dtype)
    return torch.ldexp(torch.ones_like(exact), exponent - 1) * info.eps


def table_error(got: Tensor, exact: Tensor) -> float:
    """Largest error of a float32 table in units in the last place of its exact float64 values."""
    allowed = ulp(exact, torch.float32).clamp_min(torch.finfo(torch.float32).smallest_normal)
    return ((got.double() - exact).abs() / allowed).max().item()


def check_table(name: str, got: Tensor, exact: Tensor, *, ulps: float) -> None:
    error = table_error(got, exact)
    if not error <= ulps:
        raise WrongResult(f"{name} is wrong: error {error:.3g} ulp above {ulps:.3g}")


def check_angles(name: str, got: Tensor, exact: Tensor, *, slack: float) -> None:
    """Checks tables of angles that were rounded to float32. slack: absolute error."""
    error = (got.double() - exact).abs().max().item()
    if not error <= slack:
        raise WrongResult(f"{name} is wrong: error {error:.3g} above {slack:.3g}")


def check_once_rounded(name: str, got: Tensor, exact: Tensor, *, roundings: int) -> None:
    """Checks a result of rope_ext, which has one rounding to its dtype, and `roundings` to float32
    of numbers up to the largest.
    """
    info = torch.finfo(got.dtype)
    noise = roundings * torch.finfo(torch.float32).eps * largest(exact)
    check_within(
        name, got, exact, info.eps * wide(exact).abs() + noise + info.smallest_normal * info.eps
    )


def check_roughly(name: str, got: Tensor, exact: Tensor, *, angle_slack: float) -> None:
    """Checks results of others, which round in each step, in units of the largest result."""
    slack = STEPS_SLACK * torch.finfo(got.dtype).eps + angle_slack
    check_within(name, got, exact, slack * largest(exact))


def check_within(name: str, got: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    if got.shape != exact.shape:
        raise WrongResult(f"{name} is {list(got.shape)}, not {list(exact.shape)}")
    error = (wide(got) - wide(exact)).abs()
    if not (error <= allowed).all():
        raise WrongResult(
            f"{name} is wrong: error {error.max().item():.3g} of {largest(exact):.3g}"
        )


def largest(x: Tensor) -> float:
    return wide(x).abs().max().item() if x.numel() else 0.0


def wide(x: Tensor) -> Tensor:
    """float64; also for float8, which supports few operations."""
    return x.float().double() if x.itemsize == 1 else x.double()
