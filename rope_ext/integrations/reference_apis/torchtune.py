"""torchtune's rotary module.

Source: torchtune 0.6.1, ``torchtune/modules/position_embeddings.py``.
"""

from torch import Tensor

from rope_ext import frequencies
from rope_ext.angles import cos_sin
from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.module import RotaryEmbedding
from rope_ext.rotation import apply_rotary


class RotaryPositionalEmbeddings(RotaryEmbedding):
    """Rotates neighbouring channels, as ``torchtune.modules.RotaryPositionalEmbeddings``.

    Args:
        dim: channels of a head, D.
        max_seq_len: positions that the model is meant for, in tokens.
        base: the longest wavelength is about 2 pi base tokens.

    Differs from torchtune: rotates at every position, not only below max_seq_len; angles are exact,
    where torchtune rounds position times frequency to float32; float64 stays float64; the
    frequencies stay float32 when the module is cast. The state dict is empty, as torchtune's.
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: float = 10_000) -> None:
        super().__init__(dim, base=base, max_position_embeddings=max_seq_len, interleaved=True)
        self.dim = dim
        self.max_seq_len = max_seq_len

    def rope_init(self) -> None:
        """Renews the frequencies on the default device, for torchtune's recipes."""
        self.inv_freq, _ = frequencies.default(self.dim, base=self.base)

    @names_arguments
    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Returns x, rotated.

        Args:
            x: [B, S, H, D].
            input_pos: the tokens' positions, int32 or int64 [S] or [1|B, S]. None: 0, 1, 2, ...
        """
        function = "torchtune.RotaryPositionalEmbeddings"
        if x.dim() != 4 or x.shape[-1] != self.dim:
            refuse(function, "x", f"to have shape [B, S, H, {self.dim}]", x)
        if input_pos is None:
            cos, sin = self.table(x.shape[1])
        else:
            if input_pos.dim() == 1:
                input_pos = input_pos[None]
            cos, sin = cos_sin(self.inv_freq, input_pos)
        return apply_rotary(x, cos, sin, interleaved=True)
