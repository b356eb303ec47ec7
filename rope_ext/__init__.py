"""Rotary position embeddings (RoPE) for PyTorch: exact, differentiable, compiled for CPU and CUDA.

The operators are ``torch.ops.rope.*``; the functions here add layouts and in-place autograd.
Words: B batch, S sequence, H heads, D head_dim, T tokens of a packed batch, R rotary_dim (the
channels that rotate), P = R / 2 pairs, L rows of a cos/sin table. Positions count tokens, angles
are radians.
"""

import sys
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)


def _load_compiled_part():
    """Import rope_ext._C, or raise an ImportError that says what to do."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise ImportError(f"rope_ext needs torch >= 2.10, found torch {torch.__version__}")
    try:
        from rope_ext import _C
    except ImportError as error:
        folder = Path(__file__).parent
        built = [path.name for path in folder.glob("_C.*.so")]
        python = sys.implementation.cache_tag
        if not built:
            reason = (
                f"rope_ext is not built: {folder} has no compiled part. In a clone of the "
                "repository run 'pip install -e .', or leave the clone if rope_ext is installed"
            )
        elif not any(f".{python}-" in name for name in built):
            reason = f"rope_ext was built for another Python: {', '.join(built)}, here {python}"
        else:
            reason = f"rope_ext's compiled part does not load under torch {torch.__version__}"
        raise ImportError(f"{reason} ({error})") from error
    return _C


def _register_operators():
    """Register the compiled part's operators with PyTorch. A process can do this only once."""
    try:
        # ROCm's tensors are of CUDA too, and have no kernels.
        cuda = _C.build_info()["cuda"] and torch.version.hip is None
        first = _C.register_operators("rope", for_cuda=cuda)
    except RuntimeError as error:
        from rope_ext._registration_conflict import registered_by

        raise ImportError(
            "rope_ext can't register its operators torch.ops.rope.*, as another library has "
            f"registered operators of that name: {registered_by(_C.__file__)}. A process can have "
            "one of the two: import only one, or start a new process"
        ) from error
    registering = {f"{__name__}._engine", f"{__name__}._operators"}
    if not first and not registering <= sys.modules.keys():
        raise ImportError(
            f"rope_ext has been imported before in this process, with {_C.__file__}, and removed "
            "from sys.modules. PyTorch keeps its operators, so neither this nor another can be "
            "loaded now: leave its modules in sys.modules, or start a new process"
        )


_C = _load_compiled_part()
_register_operators()

from rope_ext import _engine, _operators, frequencies, positions, reference  # noqa: E402
from rope_ext.angles import cos_sin, cos_sin_cache  # noqa: E402
from rope_ext.kv_cache import (  # noqa: E402
    apply_rotary_mla_append_,
    apply_rotary_qk_append_kv_,
    rms_norm_rotary_qk_append_kv_,
    shift_cached_k_,
)
from rope_ext.lowering import lowering  # noqa: E402
from rope_ext.module import RotaryEmbedding  # noqa: E402
from rope_ext.qkv import apply_rotary_qkv  # noqa: E402
from rope_ext.quantize import apply_rotary_quantize  # noqa: E402
from rope_ext.rms_norm import (  # noqa: E402
    rms_norm_rotary,
    rms_norm_rotary_qk,
    rms_norm_rotary_qkv,
)
from rope_ext.rotation import apply_rotary, apply_rotary_qk  # noqa: E402
from rope_ext.rotation_by_angles import apply_rotary_qk_at  # noqa: E402

_engine.register(_operators.OPERATORS)

__version__: str = _C.build_info()["version"]

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_mla_append_",
    "apply_rotary_qk",
    "apply_rotary_qk_append_kv_",
    "apply_rotary_qk_at",
    "apply_rotary_qkv",
    "apply_rotary_quantize",
    "cos_sin",
    "cos_sin_cache",
    "frequencies",
    "lowering",
    "positions",
    "reference",
    "rms_norm_rotary",
    "rms_norm_rotary_qk",
    "rms_norm_rotary_qk_append_kv_",
    "rms_norm_rotary_qkv",
    "shift_cached_k_",
]


def __dir__() -> list[str]:
    """Only the public names, without the modules that the package imports."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
