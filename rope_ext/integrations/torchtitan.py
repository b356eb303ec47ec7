"""torchtitan's decoders, rotated by rope_ext: an override of their RoPE configs.

::

    torchtitan_train ... --override.imports rope_ext.integrations.torchtitan.rope

Weights, checkpoints, positions and the angles of the tables stay torchtitan's own. The tables hold
one angle a pair, so the operators read them as they are: no rows are gathered or repeated.

Source: torchtitan 0.3.0, ``config/override.py`` and ``models/common/rope.py``.
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torchtitan
from torch import Tensor

from rope_ext.integrations.reference_apis._refusals import refuse
from rope_ext.rotation import apply_rotary_qk

TESTED = "0.3"

if not torchtitan.__version__.startswith(f"{TESTED}."):
    raise ImportError(
        f"rope_ext.integrations.torchtitan: expected torchtitan {TESTED}, as its RoPE classes are "
        f"known, got torchtitan {torchtitan.__version__}: install torchtitan=={TESTED}.*, or train "
        "without this override"
    )

from torchtitan.config import derive, override  # noqa: E402
from torchtitan.models.common.rope import (  # noqa: E402
    ComplexRoPE,
    CosSinRoPE,
    RoPE,
    _maybe_wrap_positions,
)

_HEADS = {"dp": spmd.S(0), "cp": spmd.S(1), "tp": spmd.S(2)}  # of q and k [B, S, H, D]


class _OneTable(RoPE):
    """A cache [L, D] of float32: in each row the cosines of the pairs, then their sines."""

    interleaved: bool

    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns query and key, rotated.

        Args:
            query: [B, S, H, D], a tensor or a DTensor.
            key: [B, S, KH, D], of query's dtype.
            positions: the tokens' positions, int32 or int64 [1|B, S]. None: 0, 1, 2, ...
        """
        for name, x in (("query", query), ("key", key)):
            if x.dim() != 4 or x.shape[-1] != self.config.dim:
                refuse("torchtitan.RoPE", name, f"to have shape [B, S, H, {self.config.dim}]", x)
        positions = _maybe_wrap_positions(positions, query)
        return self._rotate(query, key, positions)

    @spmd.local_map(out_types=(_HEADS, _HEADS))
    def _rotate(
        self, query: Tensor, key: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        pairs = self.config.dim // 2
        cos, sin = self.cache[:, :pairs], self.cache[:, pairs:]
        return apply_rotary_qk(query, key, cos, sin, positions, interleaved=self.interleaved)


class RopeExtComplexRoPE(_OneTable, ComplexRoPE):
    """ComplexRoPE: rotates neighbouring channels."""

    interleaved = True

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass

    def _precompute_cache(self) -> Tensor:
        return torch.view_as_real(super()._precompute_cache()).mT.flatten(1)


class RopeExtCosSinRoPE(_OneTable, CosSinRoPE):
    """CosSinRoPE: rotates channels of the first half with those of the second."""

    interleaved = False

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass

    def _precompute_cache(self) -> Tensor:
        # [L, 2, 2, P]: each cosine and each sine stands there twice
        return super()._precompute_cache().unflatten(1, (2, 2, -1))[:, :, 0].flatten(1)


@override(target=RoPE.Config, description="rotation by the operators of rope_ext")
def rope(config: RoPE.Config) -> RoPE.Config:
    """The override: the config of the class here that rotates as the config's own class does.

    Raises:
        ValueError: for a subclass of RoPE that is not known, such as MRoPE of Qwen3.5.
    """
    for known in (RopeExtComplexRoPE, RopeExtCosSinRoPE):
        if type(config) is known.Config.__base__:
            return derive(config, known.Config)
    expected = "to be of ComplexRoPE or CosSinRoPE"
    refuse("torchtitan.rope", "config", expected, type(config).__qualname__)
