"""Functions with the signatures of other libraries, each a few lines on the operators.

========================  =====================================================================
module                    what is matched
========================  =====================================================================
flash_attention           ``apply_rotary_emb``, with ``_qkv_`` and ``_kv_``, of flash-attention
transformer_engine        ``transformer_engine.pytorch.attention.apply_rotary_pos_emb``
llama                     ``apply_rotary_emb`` of Meta's Llama, with complex tables
torchtune                 ``torchtune.modules.RotaryPositionalEmbeddings``
rotary_embedding_torch    ``rotary_embedding_torch.RotaryEmbedding``
onnx                      the operator RotaryEmbedding of ONNX, opset 23
torch_functional          ``torch.nn.functional.rotary_embedding``, as proposed for PyTorch
========================  =====================================================================

None of these libraries is needed. All functions are differentiable, take the four dtypes of the
operators on the CPU and on CUDA, compute in float32 (float64 for float64) and round once. They
never copy x, q and k, and never wait for the device. The docstring of a function lists its
differences from the original.
"""

from rope_ext.integrations.reference_apis import (
    flash_attention,
    llama,
    onnx,
    rotary_embedding_torch,
    torch_functional,
    torchtune,
    transformer_engine,
)

__all__ = [
    "flash_attention",
    "llama",
    "onnx",
    "rotary_embedding_torch",
    "torch_functional",
    "torchtune",
    "transformer_engine",
]
