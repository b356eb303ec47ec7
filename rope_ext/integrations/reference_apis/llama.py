"""The rotary function of Meta's Llama, with complex tables.

Source: github.com/meta-llama/llama, ``llama/model.py``; llama3 has the same function. Models of
Meta pair neighbouring channels.
"""

import torch
from torch import Tensor

from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary_qk


@names_arguments
def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by complex numbers, as ``llama.model.apply_rotary_emb``.

    Args:
        xq: [B, S, H, D].
        xk: [B, S, KH, D], of xq's dtype.
        freqs_cis: complex64 or complex128 [S, D / 2], the rows of the tokens' positions
            (``precompute_freqs_cis(...)[start_pos : start_pos + S]``), or [1|B, S, D / 2]. Its
            absolute value scales the result, as in YaRN.

    Returns:
        The rotated xq and xk, of their shapes and dtypes.

    Differs from Llama: also takes rows for each sequence of the batch; float64 stays float64. The
    interleaved real and imaginary parts of freqs_cis, S D numbers, are copied.
    """
    function = "llama.apply_rotary_emb"
    if not freqs_cis.is_complex():
        refuse(function, "freqs_cis", "to be complex64 or complex128", freqs_cis.dtype)
    if xq.dim() != 4:
        refuse(function, "xq", "to have shape [B, S, H, D]", xq)
    batch, seq, _, head_dim = xq.shape
    rows = (seq, head_dim // 2)
    if freqs_cis.shape not in (rows, (1, *rows), (batch, *rows)):
        expected = f"to have shape {list(rows)} or [1|{batch}, {rows[0]}, {rows[1]}]"
        refuse(function, "freqs_cis", expected, freqs_cis)
    cos, sin = torch.view_as_real(freqs_cis).movedim(-1, 0).contiguous().unbind()
    return apply_rotary_qk(xq, xk, cos, sin, interleaved=True)
