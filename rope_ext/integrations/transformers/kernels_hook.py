"""The rotation as a layer for the ``kernels`` package, through which transformers takes kernels.

In transformers the function ``apply_rotary_pos_emb`` of most models is a hook named
``rotary_pos_emb``. With the package ``kernels``, ``kernels.kernelize(model, ...)`` and
``model.set_use_kernels(True)`` replace it by the layer that is registered under this name.
:func:`register_kernels` registers the operator there, for inference, for training, and for both
under ``torch.compile``, on the CPU and on CUDA.

The hook's name does not tell the convention: one model's function rotates by the negative angle,
others take tables with one angle a pair. So the layer calls the function that it replaces with test
arguments, as :func:`patch` does, and recognizes the rotation by the results. A function that is not
recognized is not replaced.

Source: transformers 5.22, ``integrations/hub_kernels.py``; kernels 0.17, ``layer/layer.py``.
"""

import importlib.metadata
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rope_ext.integrations.patching.pairs import Pairs
from rope_ext.integrations.patching.recognition import Rotation
from rope_ext.integrations.transformers.forms import recognize_hook
from rope_ext.integrations.transformers.rotations import q_and_k

HOOK = "rotary_pos_emb"
# Releases that were tested together; the extra `kernels` of pyproject.toml pins them.
TESTED = {"transformers": "5.22.2", "kernels": "0.17.2"}


class RotaryPosEmb(nn.Module):
    """The layer. kernels binds its ``forward`` to the hook of a model.

    So ``self`` is that hook, and ``type(self).forward`` is the model's own function. kernels allows
    a layer no other method and no state (``_validate_layer``).
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Returns q and k, rotated, in q's dtype. Neither is modified.

        Args:
            q: [B, H, S, D] (unsqueeze_dim 1) or [B, S, H, D] (unsqueeze_dim 2).
            k: of q's shape and dtype, but for its number of heads.
            cos: [1|B, S, D], or [1|B, S, D / 2] for models with one angle a pair; of any dtype.
            sin: as cos.
            unsqueeze_dim: the dimension of q that counts heads.
        """
        pairs = pairs_of(type(self))
        if pairs is None:
            return type(self).forward(self, q, k, cos, sin, unsqueeze_dim)
        return q_and_k(pairs)(q, k, cos, sin, unsqueeze_dim)


@torch.compiler.assume_constant_result
def pairs_of(hook: type[nn.Module]) -> Pairs | None:
    """Pairs and columns of a hook's function; None, with a warning, if it is not recognized."""
    rotation = rotation_of(hook)
    if rotation is not None:
        return rotation.pairs
    warnings.warn(
        f"rope_ext: {_name(hook)} is no rotation that rope_ext knows and is not replaced",
        stacklevel=3,
    )
    return None


def rotation_of(hook: type[nn.Module]) -> Rotation | None:
    """The rotation of a hook's function; None if it is not a rotation of q and k as a whole."""
    if hook.forward is RotaryPosEmb.forward:
        raise TypeError(
            "kernels_hook.RotaryPosEmb: expected kernels to bind forward to the hook of a model, "
            "got a call of the layer itself"
        )
    rotation = recognize_hook(hook)
    return rotation if rotation is not None and rotation.form is q_and_k else None


def _name(hook: type[nn.Module]) -> str:
    """The name of the function that kernels made the hook from."""
    closure = getattr(hook.forward, "__closure__", None) or ()
    functions = (cell.cell_contents for cell in closure if callable(cell.cell_contents))
    named = next(functions, hook)
    return f"{named.__module__}.{named.__qualname__}"


def hooked_rotations(model: nn.Module) -> dict[str, Rotation | None]:
    """The hooked functions of a model, by name, and the rotation of each: those that kernelizing it
    replaces.

    None stands for a function that is not replaced. An empty dict is a model without a hook that
    kernels can reach: kernelizing does not change its rotation. (Many model families of
    transformers define the hook but attach it to no module.)
    """
    hooks = dict.fromkeys(
        type(function)
        for module in model.modules()
        for attribute in ("_kernel_funcs", "_hidden_kernels")  # older transformers: the second
        for function in (*getattr(module, attribute, {}).values(), module)
        if getattr(type(function), "kernel_layer_name", None) == HOOK
    )
    return {_name(hook): rotation_of(hook) for hook in hooks}


@dataclass(frozen=True)
class _Repository:
    """A source of layers, in the form that kernels expects."""

    layer_name: str = RotaryPosEmb.__name__

    def load(self) -> type[nn.Module]:
        return RotaryPosEmb

    def __str__(self) -> str:
        return f"rope_ext, layer {self.layer_name}"


def _require_hooks() -> None:
    """Raises if transformers' functions are no hooks, so that no kernel can replace them.

    A release of transformers works with few releases of kernels, and decides at import.
    """
    import kernels
    import transformers
    from transformers.models.llama import modeling_llama

    if getattr(type(modeling_llama.apply_rotary_pos_emb), "kernel_layer_name", None) == HOOK:
        return
    requirements = importlib.metadata.requires("transformers") or ()
    takes = [name.partition(";")[0] for name in requirements if name.startswith("kernels")]
    setting = os.environ.get("USE_HUB_KERNELS")
    raise ImportError(
        "register_kernels: expected transformers and kernels to go together, got transformers "
        f"{transformers.__version__} with kernels {kernels.__version__}"
        f"{f' and USE_HUB_KERNELS={setting}' if setting else ''}, whose models have no hooks: this "
        f"transformers asks for {takes[0] if takes else 'no kernels'}, installed before it is "
        "imported. Tested: "
        + " with ".join(f"{name} {version}" for name, version in TESTED.items())
        + " (pip install 'rope_ext[kernels]')"
    )


def kernel_mapping() -> dict[str, dict[Any, Any]]:
    """The mapping that :func:`register_kernels` registers, for use in a ``with`` statement.

    This replaces only the rotation::

        with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")

    Raises:
        ImportError: as :func:`register_kernels`.
    """
    try:
        from kernels import CUDAProperties, Device, Mode
    except ImportError as error:
        raise ImportError(f"register_kernels: expected the package kernels, got {error}") from error
    _require_hooks()
    # kernels also takes a layer for training and torch.compile for all other uses.
    layer = {Mode.TRAINING | Mode.TORCH_COMPILE: _Repository()}
    # All capabilities, but a narrower range than that of transformers' own entry: the narrower one
    # is taken, even if set_use_kernels registers its own entry again.
    cuda = Device(type="cuda", properties=CUDAProperties(min_capability=0, max_capability=10**6))
    return {HOOK: {"cpu": layer, cuda: layer}}


def register_kernels() -> None:
    """Registers the operator as the kernel of the rotary hook of transformers, in this process.

    Afterwards ``kernels.kernelize(model, mode=..., device=...)`` and, on the model's device,
    ``model.set_use_kernels(True)`` use the operator, in all modes, instead of the hub's kernel,
    which has no backward. All models of a family share their hook: kernelizing one kernelizes all
    of them. Other hooks, and transformers' own mapping, stay as they are. :func:`hooked_rotations`
    lists the functions that will be replaced.

    In float32 the results have the bits of the model's own function. In bfloat16 and float16 they
    are rounded once, where that function rounds each product. They have q's dtype, also where the
    function would return the dtype of float32 tables (as under autocast).

    Raises:
        ImportError: if the package kernels is not installed, or if the installed transformers does
            not work with its release: then no function of its models is a hook.
    """
    mapping = kernel_mapping()
    from kernels import register_kernel_mapping

    register_kernel_mapping(mapping)
