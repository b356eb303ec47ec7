"""The rotary function proposed for ``torch.nn.functional``.

Source: github.com/pytorch/pytorch/pull/187286 (open in June 2026), for issue 149534:
``rotary_embedding(x, cos, sin, position_ids=None, *, interleaved=False)``, as in its description.
PyTorch has no such function yet; names and shapes may change there.
"""

from torch import Tensor

from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary


@names_arguments
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotates x [B, H, S, D], the layout of ``scaled_dot_product_attention``.

    Args:
        x: [B, H, S, D].
        cos: with position_ids a table [N, D / 2]; without, anything that broadcasts to
            [B, H, S, D / 2] and is the same for all heads: [S, D / 2], [1, S, D / 2] or
            [1|B, 1, S, D / 2], each S possibly 1.
        sin: as cos.
        position_ids: int32 or int64 [1|B, S], the rows of the table.
        interleaved: pairs are neighbouring channels instead of halves.

    Returns:
        The rotated x, of its shape and dtype.

    Differs from the proposal: tables that differ between heads raise.
    """
    function = "torch_functional.rotary_embedding"
    if x.dim() != 4:
        refuse(function, "x", "to have shape [B, H, S, D]", x)
    batch, _, seq, head_dim = x.shape
    pairs = head_dim // 2
    if position_ids is None:
        cos = _rows(function, "cos", cos, batch, seq, pairs)
        sin = _rows(function, "sin", sin, batch, seq, pairs)
    else:
        if cos.dim() != 2 or cos.shape[-1] != pairs:
            refuse(function, "cos", f"to have shape [N, {pairs}] with position_ids", cos)
        if position_ids.dim() != 2:
            refuse(function, "position_ids", f"to have shape [{batch}, {seq}]", position_ids)
    return apply_rotary(
        x, cos, sin, position_ids, rotary_dim=head_dim, interleaved=interleaved, layout="bhsd"
    )


def _rows(function: str, name: str, rows: Tensor, batch: int, seq: int, pairs: int) -> Tensor:
    """rows, which broadcast to [B, 1, S, D / 2], as a view [1|B, S, D / 2]."""
    *leading, tokens, width = (1, 1, 1, *rows.shape)[-4:]
    if (
        rows.dim() not in (1, 2, 3, 4)
        or width != pairs
        or tokens not in (1, seq)
        or (leading[0] not in (1, batch) or leading[1] != 1)
    ):
        expected = f"to have shape [{seq}, {pairs}] or [1|{batch}, 1, {seq}, {pairs}]"
        refuse(function, name, expected, rows)
    return rows.expand(leading[0], 1, seq, width).squeeze(1)
