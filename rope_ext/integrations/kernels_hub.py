"""The rotation as a layer for the ``kernels`` package, through which transformers takes kernels.

In transformers the function ``apply_rotary_pos_emb`` of most models is a hook of the name
``rotary_pos_emb``: where the package ``kernels`` is installed, ``kernels.kernelize(model, ...)``
and ``model.set_use_kernels(True)`` replace it by what is registered under that name.
:func:`register_kernels` registers the operator there, for inference, for training, and for both
under ``torch.compile``, on the CPU and on CUDA.

The hook's name does not tell the convention: one model's function rotates by the negative angle,
others take tables with one angle a pair. So the layer asks the function that it replaces: each is
called once, on a few numbers, and what it computes decides. A function that is none of the
operator's rotations goes on doing its work itself, as does any call that the operator can't take.

Source: transformers 5.22, ``integrations/hub_kernels.py``; kernels 0.17, ``layer/layer.py``.
"""

import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rope_ext import reference
from rope_ext.ops import apply_rotary_qk

HOOK = "rotary_pos_emb"


class Rotation(NamedTuple):
    """What a model's own function computes."""

    per_channel: bool  # cos and sin [.., D], one angle a channel; else [.., D / 2], one a pair
    interleaved: bool  # pairs are neighbouring channels instead of halves
    negated: bool  # by the negative angle
    partial: bool  # cos and sin may be narrower than D: the other channels stay

    def __str__(self) -> str:
        return ", ".join(
            (
                "interleaved" if self.interleaved else "half-split",
                "one angle a channel" if self.per_channel else "one angle a pair",
                *(["negative angle"] if self.negated else []),
                *(["partial"] if self.partial else []),
            )
        )

    def rotary_dim(self, width: int, head_dim: int) -> int | None:
        """The channels that rotate by tables of this width; None: not a call that was tried."""
        dim = width if self.per_channel else 2 * width
        return dim if dim == head_dim or (self.partial and 0 < dim < head_dim) else None


class RotaryPosEmb(nn.Module):
    """The layer. kernels binds its ``forward`` to the hook of a model.

    So ``self`` is that hook, and ``type(self).forward`` the model's own function. A layer may have
    no other method and no state (kernels, ``_validate_layer``).
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Returns q and k, rotated, in q's dtype; neither is written.

        Args:
            q: [B, H, S, D] (unsqueeze_dim 1) or [B, S, H, D] (unsqueeze_dim 2).
            k: of q's shape and dtype, but for its number of heads.
            cos: [1|B, S, D], or [1|B, S, D / 2] for models with one angle a pair; of any dtype.
            sin: as cos.
            unsqueeze_dim: the dimension of q that counts heads.
        """
        rotation = rotation_of(type(self))
        rotary_dim = None
        if rotation is not None and unsqueeze_dim in (1, 2) and (q.dim(), cos.dim()) == (4, 3):
            rotary_dim = rotation.rotary_dim(cos.shape[-1], q.shape[-1])
        if rotation is None or rotary_dim is None:
            return type(self).forward(self, q, k, cos, sin, unsqueeze_dim)
        return apply_rotary_qk(
            q,
            k,
            cos,
            -sin if rotation.negated else sin,
            rotary_dim=rotary_dim,
            interleaved=rotation.interleaved,
            layout="bhsd" if unsqueeze_dim == 1 else "bshd",
        )


@torch.compiler.assume_constant_result
def rotation_of(hook: type[nn.Module]) -> Rotation | None:
    """What the function of a hook computes, or None, with a warning, if no rotation of ours."""
    return _rotation_of(hook)


@functools.cache
def _rotation_of(hook: type[nn.Module]) -> Rotation | None:
    if hook.forward is RotaryPosEmb.forward:
        raise TypeError(
            "rope_ext kernels_hub.RotaryPosEmb: expected kernels to bind forward to the "
            "hook of a model, got a call of the layer itself"
        )
    # Numbers, even while a model is traced with tensors that have none.
    with _disable_current_modes(), torch.no_grad():
        for per_channel, interleaved, negated in itertools.product(
            (True, False), (False, True), (False, True)
        ):
            rotation = Rotation(per_channel, interleaved, negated, partial=False)
            if _computes(hook, rotation, rotary_dim=8):
                partial = _computes(hook, rotation, rotary_dim=6)
                return rotation._replace(partial=partial)
    warnings.warn(
        f"rope_ext: {_name(hook)} is none of the rotations of rope::apply_rotary_qk and is not "
        "replaced",
        stacklevel=3,
    )
    return None


def _computes(hook: type[nn.Module], rotation: Rotation, rotary_dim: int) -> bool:
    """Whether the hook's own function is this rotation, of heads of 8 channels.

    Every number of the tables is another one, so a function that reads half of a table, or
    rearranges it, is another rotation.
    """
    width = rotary_dim if rotation.per_channel else rotary_dim // 2
    q, k, cos, sin = (
        torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
        .add(start)
        .sin()
        .view(shape)
        for start, shape in enumerate(((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, width), (2, 5, width)))
    )
    try:
        results = hook.forward(None, q, k, cos, sin)  # type: ignore[arg-type]
        ours = [
            reference.apply_rotary(
                x.transpose(1, 2),
                cos,
                -sin if rotation.negated else sin,
                rotary_dim=rotary_dim,
                interleaved=rotation.interleaved,
            ).transpose(1, 2)
            for x in (q, k)
        ]
        # Of numbers up to 1, so a few roundings of 2^-24.
        return all(
            torch.allclose(*pair, rtol=0, atol=1e-6) for pair in zip(results, ours, strict=True)
        )
    except Exception:  # it is someone else's function, not made for these shapes
        return False


def _name(hook: type[nn.Module]) -> str:
    """The name of the function that kernels has made the hook of."""
    closure = getattr(hook.forward, "__closure__", None) or ()
    functions = (cell.cell_contents for cell in closure if callable(cell.cell_contents))
    named = next(functions, hook)
    return f"{named.__module__}.{named.__qualname__}"


def hooked_rotations(model: nn.Module) -> dict[str, Rotation | None]:
    """What kernelizing the model changes: its hooked functions, by name, and what each computes.

    None stands for a function that is not replaced. An empty dict is a model without a hook that
    kernels can reach: kernelizing does nothing to its rotation. (Many model families of
    transformers define the hook but attach it to no module.)
    """
    hooks = {
        type(function)
        for module in model.modules()
        for function in (*getattr(module, "_kernel_funcs", {}).values(), module)
        if getattr(type(function), "kernel_layer_name", None) == HOOK
    }
    return {_name(hook): rotation_of(hook) for hook in hooks}


@dataclass(frozen=True)
class _Repository:
    """What kernels loads a layer from."""

    layer_name: str = RotaryPosEmb.__name__

    def load(self) -> type[nn.Module]:
        return RotaryPosEmb

    def __str__(self) -> str:
        return f"rope_ext, layer {self.layer_name}"


def kernel_mapping() -> dict[str, dict[Any, Any]]:
    """The mapping that :func:`register_kernels` registers, for use within a context.

    This replaces the rotation and nothing else::

        with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")

    Raises:
        ImportError: if the package kernels is not installed.
    """
    try:
        from kernels import CUDAProperties, Device, Mode
    except ImportError as error:
        raise ImportError(
            f"rope_ext kernels_hub: expected the package kernels, got {error}"
        ) from error
    # kernels takes a layer for training and torch.compile for all other uses as well.
    layer = {Mode.TRAINING | Mode.TORCH_COMPILE: _Repository()}
    # All capabilities, but fewer than transformers' own entry is for: the narrower one is taken,
    # even when set_use_kernels has registered its own once more.
    cuda = Device(type="cuda", properties=CUDAProperties(min_capability=0, max_capability=10**6))
    return {HOOK: {"cpu": layer, cuda: layer}}


def register_kernels() -> None:
    """Registers the operator as the kernel of the rotary hook of transformers, in this process.

    Afterwards ``kernels.kernelize(model, mode=..., device=...)`` and, on the device where the model
    is, ``model.set_use_kernels(True)`` take it, in all modes, instead of the hub's kernel, which
    has no backward. All models of a family share their hook: kernelizing one is kernelizing all of
    them. Other hooks, and transformers' own mapping, stay as they are. :func:`hooked_rotations`
    tells what will be replaced.

    In float32 the results have the bits of the model's own function; in bfloat16 and float16 they
    are rounded once, where that function rounds each product. They have q's dtype also where the
    function would return that of float32 tables (as under autocast).

    Raises:
        ImportError: if the package kernels is not installed.
    """
    mapping = kernel_mapping()
    from kernels import register_kernel_mapping

    register_kernel_mapping(mapping)
