"""The rotary module of the package rotary-embedding-torch.

Source: rotary-embedding-torch 0.9.1, ``rotary_embedding_torch.py``. xPos: Sun
et al., arXiv 2212.10554.
"""

from collections.abc import Callable
from math import pi
from typing import Literal

import torch
from torch import Tensor, nn

from rope_ext.angles import cos_sin_cache
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary


class RotaryEmbedding(nn.Module):
    """Rotates neighbouring channels, as ``rotary_embedding_torch.RotaryEmbedding``.

    Args:
        dim: channels that rotate, R, for freqs_for "lang" and "pixel".
        custom_freqs: frequencies [R / 2], in radians per token, instead of freqs_for.
        freqs_for: "lang" (frequencies of RoFormer), "pixel" (R / 2 frequencies from pi to
            pi max_freq / 2) or "constant" (num_freqs frequencies of 1).
        theta, max_freq, num_freqs: see freqs_for.
        learned_freq: whether the parameter ``freqs`` is trained.
        use_xpos: scale keys down and queries up, by ``get_scale``.
        xpos_scale_base: positions for one power of it, in tokens.
        interpolate_factor: positions are divided by it; at least 1.
        theta_rescale_factor: theta is multiplied by this to the power of dim / (dim - 2).
        seq_before_head_dim: x is [B, S, H, D] instead of [B, H, S, D].
        cache_if_possible, cache_max_seq_len: accepted and ignored: every call makes its tables.

    Differs from rotary-embedding-torch: positions are exact, where the original counts them in x's
    dtype (exact up to 256 for bfloat16); frequencies that are not learned keep their dtype when the
    module is cast; results have x's dtype and are rounded once; only the even columns of ``scale``
    are read. Not provided: forward, get_seq_pos, get_axial_freqs, and cached keys with use_xpos,
    whose scales in the original depend on the length of the cache.
    """

    def __init__(
        self,
        dim: int,
        custom_freqs: Tensor | None = None,
        freqs_for: Literal["lang", "pixel", "constant"] = "lang",
        theta: float = 10000,
        max_freq: float = 10,
        num_freqs: int = 1,
        learned_freq: bool = False,
        use_xpos: bool = False,
        xpos_scale_base: float = 512,
        interpolate_factor: float = 1.0,
        theta_rescale_factor: float = 1.0,
        seq_before_head_dim: bool = False,
        cache_if_possible: bool = True,
        cache_max_seq_len: int = 8192,
    ) -> None:
        super().__init__()
        function = "rotary_embedding_torch.RotaryEmbedding"
        if interpolate_factor < 1:
            refuse(function, "interpolate_factor", "to be at least 1", interpolate_factor)
        if custom_freqs is not None:
            freqs = custom_freqs
        elif freqs_for == "lang":
            theta = theta * theta_rescale_factor ** (dim / (dim - 2)) if dim > 2 else theta
            freqs = 1.0 / theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)
        elif freqs_for == "pixel":
            freqs = torch.linspace(1.0, max_freq / 2, dim // 2) * pi
        elif freqs_for == "constant":
            freqs = torch.ones(num_freqs)
        else:
            refuse(function, "freqs_for", "to be lang, pixel or constant", repr(freqs_for))
        self.dim = dim
        self.freqs = nn.Parameter(freqs, requires_grad=learned_freq)
        self.freqs_for = freqs_for
        self.learned_freq = learned_freq
        self.interpolate_factor = interpolate_factor
        self.seq_before_head_dim = seq_before_head_dim
        self.default_seq_dim = -3 if seq_before_head_dim else -2
        self.use_xpos = use_xpos
        self.scale_base = xpos_scale_base

    @names_arguments
    def rotate_queries_or_keys(
        self,
        t: Tensor,
        seq_dim: int | None = None,
        offset: int = 0,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """Returns t, rotated.

        Args:
            t: [B, H, S, D], [B, S, D] or [S, D] with the tokens in the last dimension but one;
                [B, S, H, D] or [S, H, D] if in the last but two.
            seq_dim: the tokens' dimension. None: as seq_before_head_dim says.
            offset: position of the first token.
            scale: a factor, or [S, R] as :meth:`get_scale` returns it: one factor a pair, read from
                the even columns.
        """
        if self.use_xpos and scale is None:
            refuse(
                "rotary_embedding_torch.rotate_queries_or_keys",
                "scale",
                "to be given with use_xpos (rotate_queries_and_keys makes it)",
                scale,
            )
        return self._rotate("rotate_queries_or_keys", "t", t, seq_dim, offset, scale)

    @names_arguments
    def rotate_queries_and_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns q and k, rotated and scaled; for use_xpos. Both start at position 0.

        Args:
            q: as t of :meth:`rotate_queries_or_keys`.
            k: of as many tokens as q.
            seq_dim: as of :meth:`rotate_queries_or_keys`.
        """
        function = "rotate_queries_and_keys"
        if not self.use_xpos:
            refuse(f"rotary_embedding_torch.{function}", "use_xpos", "to be set", self.use_xpos)
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        if k.shape[seq_dim] != q.shape[seq_dim]:
            expected = f"to have the {q.shape[seq_dim]} tokens of q"
            refuse(f"rotary_embedding_torch.{function}", "k", expected, k)
        position = torch.arange(q.shape[seq_dim], device=q.device)
        scale = self.get_scale(position / self.interpolate_factor)
        return (
            self._rotate(function, "q", q, seq_dim, 0, scale),
            self._rotate(function, "k", k, seq_dim, 0, scale**-1),
        )

    @names_arguments
    def rotate_queries_with_cached_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Returns q and k, rotated: k from position 0, q ending at the same position, plus offset.

        Args:
            q: as t of :meth:`rotate_queries_or_keys`.
            k: of at least as many tokens as q.
            seq_dim: as of :meth:`rotate_queries_or_keys`.
            offset: added to the positions of q.
        """
        function = "rotate_queries_with_cached_keys"
        if self.use_xpos:
            refuse(f"rotary_embedding_torch.{function}", "use_xpos", "not to be set", self.use_xpos)
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        before = k.shape[seq_dim] - q.shape[seq_dim]
        if before < 0:
            expected = f"to have at least the {q.shape[seq_dim]} tokens of q"
            refuse(f"rotary_embedding_torch.{function}", "k", expected, k)
        return (
            self._rotate(function, "q", q, seq_dim, before + offset, None),
            self._rotate(function, "k", k, seq_dim, 0, None),
        )

    @names_arguments
    def get_scale(self, t: Tensor) -> Tensor:
        """The factors of xPos for the positions t [S], float32: [S, R], each pair's twice."""
        channel = torch.arange(0, self.dim, 2, dtype=torch.float32, device=t.device)
        scale = (channel + 0.4 * self.dim) / (1.4 * self.dim)
        power = (t - t.shape[0] // 2) / self.scale_base
        return (scale ** power[:, None]).repeat_interleave(2, dim=-1)

    def _rotate(
        self,
        function: str,
        name: str,
        x: Tensor,
        seq_dim: int | None,
        offset: int,
        scale: float | Tensor | None,
    ) -> Tensor:
        function = f"rotary_embedding_torch.{function}"
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        from_end = seq_dim - x.dim() if seq_dim >= 0 else seq_dim
        if from_end not in (-2, -3):
            refuse(function, "seq_dim", "to be the last dimension but one or two", seq_dim)
        if not -from_end <= x.dim() <= 4:
            refuse(function, name, f"to have {-from_end} to 4 dimensions", x)
        if not isinstance(offset, int):
            refuse(function, "offset", "to be an int", offset)
        added = 4 - x.dim()
        view = x[(None,) * added]
        cos, sin = cos_sin_cache(
            self.freqs / self.interpolate_factor, view.shape[from_end], start=offset
        )
        if scale is not None:
            scale = scale[..., ::2] if isinstance(scale, Tensor) else scale
            cos, sin = cos * scale, sin * scale
        layout = "bhsd" if from_end == -2 else "bshd"
        return apply_rotary(view, cos, sin, interleaved=True, layout=layout)[(0,) * added]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Follows moves to another device; a dtype only if the frequencies are learned."""
        before = self.freqs.data
        super()._apply(fn, recurse)
        if not self.learned_freq and not before.is_meta:
            self.freqs.data = before.to(self.freqs.device)
        return self
