"""ONNX's operator RotaryEmbedding as a function.

Source: onnx.ai/onnx/operators/onnx__RotaryEmbedding.html, opset 23.
"""

from torch import Tensor

from rope_ext.integrations.reference_apis._refusals import names_arguments, refuse
from rope_ext.rotation import apply_rotary


@names_arguments
def rotary_embedding(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotates X like ONNX's RotaryEmbedding, opset 23, with its inputs and attributes.

    Args:
        X: [B, H, S, D], or [B, S, H D] with num_heads.
        cos_cache: [max_position_id_plus_1, R / 2] with position_ids; else [B, S, R / 2]. Of X's
            dtype or another one.
        sin_cache: as cos_cache.
        position_ids: int32 or int64 [B, S].
        interleaved: pairs are neighbouring channels instead of halves.
        num_heads: H, for an X of three dimensions.
        rotary_embedding_dim: channels that rotate, R. 0: D.

    Returns:
        Y, of X's shape and dtype.

    Differs from ONNX: takes float64 too; cos_cache or position_ids may have a batch of one.
    """
    function = "onnx.rotary_embedding"
    if X.dim() == 4:
        x, layout = X, "bhsd"
    elif X.dim() == 3:
        if num_heads < 1 or X.shape[-1] % num_heads:
            expected = f"to divide the {X.shape[-1]} channels of X [B, S, H D]"
            refuse(function, "num_heads", expected, num_heads)
        x, layout = X.unflatten(-1, (num_heads, -1)), "bshd"
    else:
        refuse(function, "X", "to have shape [B, H, S, D] or [B, S, H D]", X)
    rotary_dim = rotary_embedding_dim or x.shape[-1]
    width = rotary_dim // 2
    shape, rank = ("[B, S", 3) if position_ids is None else ("[max_position_id_plus_1", 2)
    if cos_cache.dim() != rank or cos_cache.shape[-1] != width:
        given = "without" if position_ids is None else "with"
        refuse(
            function,
            "cos_cache",
            f"to have shape {shape}, {width}] {given} position_ids",
            cos_cache,
        )
    y = apply_rotary(
        x,
        cos_cache,
        sin_cache,
        position_ids,
        rotary_dim=rotary_dim,
        interleaved=bool(interleaved),
        layout=layout,
    )
    return y if X.dim() == 4 else y.flatten(-2)
