"""vLLM's rotary embeddings by rope_ext, as a plugin that vLLM finds by its entry point.

vLLM calls :func:`register` in each of its processes. From then on it makes, in place of each of its
rotary classes, one that derives from it: with the frequencies, the length and the scaling of the
class, but with an exact table, and with the operators for the rotation. An instance compares both
with what vLLM's own code computes when it is made, so a class that means something else in another
release is refused by name.
"""

import importlib
import logging
import math
import pkgutil
from typing import Any

import torch
from torch import Tensor, nn

from rope_ext.angles import cos_sin, cos_sin_cache
from rope_ext.positions import axial_axes, mrope_axes
from rope_ext.rotation import apply_rotary, apply_rotary_qk

PACKAGE = "vllm.model_executor.layers.rotary_embedding"
PLUGIN_OFF = "VLLM_PLUGINS='' in the environment leaves all rotations to vLLM"
# Classes that keep vLLM's own rotation, each with the reason.
LEFT = {
    "DualChunkRotaryEmbedding": "it rotates each query five times, on CUDA only",
    "FourierRotaryEmbedding": "its table is learned, so its pairs do not rotate",
}
log = logging.getLogger("vllm.plugins.rope_ext")


class Unsupported(RuntimeError):
    """A release of vLLM, or a rotary class of it, that is not known here."""


def register() -> None:
    """Makes vLLM's rotary classes rotate by rope_ext in this process. A second call does nothing.

    Raises:
        Unsupported: for a vLLM without CustomOp.register_oot or RotaryEmbedding, and where another
            plugin has already replaced a class.
    """
    try:
        package = importlib.import_module(PACKAGE)
        custom_op = importlib.import_module("vllm.model_executor.custom_op")
        op, replaced = custom_op.CustomOp, custom_op.op_registry_oot
        op.register_oot, package.get_rope, package.RotaryEmbedding  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise _unsupported("RotaryEmbedding, get_rope and CustomOp.register_oot", error) from error
    made = {}
    for name, own in _classes(package).items():
        now = replaced.get(name, own) if issubclass(own, op) else getattr(package, name, own)
        if issubclass(now, _Replacement):
            continue
        if now is not own:
            raise _unsupported(f"{name} to be vLLM's own", f"{now.__module__}.{now.__qualname__}")
        kind = _Left if name in LEFT else KINDS.get(name, _Unknown)
        made[name] = type(f"RopeExt{name}", (kind, own), {"vllm_class": own, "vllm_name": name})
    for name, ours in made.items():
        if issubclass(ours, op):
            op.register_oot(name=name)(ours)
        else:
            setattr(package, name, ours)  # where get_rope finds it


def _classes(package: Any) -> dict[str, type]:
    """The modules that are defined in vLLM's package, without the base of some, by name."""
    found = {}
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{PACKAGE}.{file.name}")
        for name, value in vars(module).items():
            is_module = isinstance(value, type) and issubclass(value, nn.Module)
            if is_module and value.__module__ == module.__name__ and name != "RotaryEmbeddingBase":
                found[name] = value
    return found


def _unsupported(expected: str, got: object, advice: str = "") -> Unsupported:
    version = getattr(importlib.import_module("vllm"), "__version__", "of no version")
    return Unsupported(
        f"rope_ext.integrations.vllm: expected {expected}, got {got} (vllm {version}): "
        f"{advice}{PLUGIN_OFF}"
    )


class _Replacement:
    """A base of the classes that vLLM makes in place of its own."""

    vllm_class: type
    vllm_name: str

    def _become_vllms(self, *args: Any, **kwargs: Any) -> None:
        """Makes this object what it would be without rope_ext."""
        own = self.vllm_class
        self.__class__ = own
        own.__init__(self, *args, **kwargs)  # type: ignore[misc]


class _Left(_Replacement):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        log.warning("rope_ext leaves %s to vLLM: %s", self.vllm_name, LEFT[self.vllm_name])
        self._become_vllms(*args, **kwargs)


class _Rotation(_Replacement):
    """Rotates by the operators, unless vLLM's custom_ops has -NAME of the class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = importlib.import_module("vllm.config").get_cached_compilation_config()
        on, off = f"+{self.vllm_name}", f"-{self.vllm_name}"
        if off in config.custom_ops:
            config.disabled_custom_ops.update([self.vllm_name])
            self._become_vllms(*args, **kwargs)
            return
        if on not in config.custom_ops:
            # Under torch.compile the list turns off what it does not name. It is also part of the
            # key of vLLM's cache of compiled models, which holds some from before rope_ext.
            config.custom_ops.append(on)
        super().__init__(*args, **kwargs)
        config.enabled_custom_ops.update([self.vllm_name])
        self._finish()

    def _finish(self) -> None:
        """Completes an instance that vLLM's own code has made, and checks its rotation."""

    def _own_forward(self, *args: Any) -> Any:
        """What vLLM's own code, in plain PyTorch, computes."""
        own = self.vllm_class
        function = own.forward if "forward" in vars(own) else own.forward_native  # type: ignore[attr-defined]
        return function(self, *args)

    def _compare(self, what: str, got: Tensor, own: Tensor, allowed: Tensor | float) -> None:
        """Raises unless `got` and what vLLM's own code made differ by at most `allowed`."""
        if got.is_meta:
            return
        if got.shape != own.shape or not bool(((got - own).abs() <= allowed).all()):
            raise _unsupported(
                f"{self.vllm_name} to have the {what} that rope_ext knows",
                "another one",
                f"{'-' + self.vllm_name!r} in custom_ops leaves this class to vLLM, ",
            )


class _Unknown(_Rotation):
    def _finish(self) -> None:
        raise _unsupported(
            f"a rotary class among {', '.join(sorted(KINDS))}",
            self.vllm_name,
            f"{'-' + self.vllm_name!r} in custom_ops leaves this class to vLLM, ",
        )


class _ByTable(_Rotation):
    """A class with a table of all positions: cos of each pair, then sin.

    vLLM's buffer stays in the dtype that the class gives it, as kernels of some models read it; its
    values are rounded once. The rotation takes float32_table.
    """

    float32_table: Tensor  # [L, 2P]
    buffer = "cos_sin_cache"  # vLLM's

    def _compute_inv_freq(self, *args: Any) -> Tensor:
        with torch.device("cpu"):  # as in transformers: a power has other bits on a GPU
            inv_freq = super()._compute_inv_freq(*args)  # type: ignore[misc]
        self.__dict__["_inv_freq"] = inv_freq = inv_freq.to(torch.get_default_device())
        return inv_freq

    def _compute_cos_sin_cache(self, *args: Any) -> Tensor:
        own = super()._compute_cos_sin_cache(*args)  # type: ignore[misc]
        factor = args[2] if args else getattr(self, "mscale", 1.0)  # args: of LongRoPE
        table = self._table(len(own), factor)
        rows = torch.linspace(0, len(own) - 1, 64, device=own.device).long()
        # vLLM rounds the angle, at most its row, to float32, and then the angle's cos and sin
        allowed = (2.0**-20 + 2.0**-22 * rows[:, None]) * max(factor, 1.0)
        self._compare("table", table[rows], own[rows], allowed)
        self.__dict__.setdefault("_tables", []).append(table)
        return table

    def _table(self, length: int, factor: float) -> Tensor:
        inv_freq = self.__dict__["_inv_freq"]
        return torch.cat(cos_sin_cache(inv_freq, length, attention_scaling=factor), -1)

    def _finish(self) -> None:
        tables = self.__dict__.pop("_tables")
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        self.register_buffer("float32_table", table, persistent=False)  # type: ignore[attr-defined]
        if not table.is_meta:
            for positions in self._some_positions(table.device):
                self._check_rotation(positions)

    def _some_positions(self, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.tensor([1, 0, 2], device=device),)

    def _check_rotation(self, positions: Tensor) -> None:
        dtype = getattr(self, self.buffer).dtype
        shape = positions.shape[-1], 3, self.head_size  # type: ignore[attr-defined]
        heads = torch.arange(math.prod(shape), device=positions.device).sin().to(dtype).view(shape)
        own = self._own_forward(positions, heads[:, :2].clone(), heads[:, 2:].clone())
        got = self.forward(positions, heads[:, :2].clone(), heads[:, 2:].clone())
        allowed = 8 * torch.finfo(dtype).eps * float(self.float32_table.abs().max())
        for x, y in zip(got, own, strict=True):
            self._compare("rotation", x.reshape(y.shape), y, allowed)

    def forward(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor | None = None,
        offsets: Tensor | None = None,
        inverse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Rotates query and key [T, H * D] or [T, H, D] in place.

        positions: [T], or [3, T] for M-RoPE.
        """
        if offsets is not None:
            positions = positions + offsets
        head_size = self._head_size(query)
        options: dict[str, Any] = {
            "rotary_offset": self._first_channel(head_size),
            "interleaved": not getattr(self, "is_neox_style", True),
            "inverse": inverse,
            "layout": "thd",
            "inplace": not torch.compiler.is_compiling(),
        }
        cos, sin, position_ids = self._rows(positions)
        tokens = len(cos if position_ids is None else position_ids)
        q = query.view(tokens, -1, head_size)
        if key is None:
            return apply_rotary(q, cos, sin, position_ids, **options).view(query.shape), None
        k = key.view(tokens, -1, head_size)
        q, k = apply_rotary_qk(q, k, cos, sin, position_ids, **options)
        return q.view(query.shape), k.view(key.shape)

    # for vLLM's code that calls one of them itself
    forward_cpu = forward_cuda = forward_hip = forward_xpu = forward_oot = forward

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos, sin, and the rows of each token; None: cos and sin are those rows."""
        return *self.float32_table.chunk(2, -1), positions.flatten()

    def _head_size(self, query: Tensor) -> int:
        return self.head_size  # type: ignore[attr-defined]

    def _first_channel(self, head_size: int) -> int:
        return 0


class _Linear(_ByTable):
    """A table for each factor, one after the other; position / factor as transformers has it."""

    def _table(self, length: int, factor: float) -> Tensor:
        inv_freq = self.__dict__["_inv_freq"]
        longest = self.max_position_embeddings  # type: ignore[attr-defined]
        parts = [
            torch.cat(cos_sin_cache(inv_freq / scale, math.ceil(longest * scale)), -1)
            for scale in self.scaling_factors  # type: ignore[attr-defined]
        ]
        return torch.cat(parts)


class _LongRope(_ByTable):
    """The rows of the short factors, then those of the long ones."""

    buffer = "long_short_cos_sin_cache"

    def _own_forward(self, positions: Tensor, *heads: Tensor) -> Any:
        return super()._own_forward(positions, *(x.flatten(1) for x in heads))

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.use_long_rope:  # type: ignore[attr-defined]
            positions = positions + self.original_max_position_embeddings  # type: ignore[attr-defined]
        return super()._rows(positions)


class _LastChannels(_ByTable):
    """DeepSeek V4: heads of any size, of which the last channels rotate."""

    def _head_size(self, query: Tensor) -> int:
        return query.shape[-1]

    def _first_channel(self, head_size: int) -> int:
        return head_size - self.rotary_dim  # type: ignore[attr-defined]


class _Axes(_ByTable):
    """M-RoPE: each pair takes its position from an axis of positions [3, T]."""

    pair_axes: Tensor  # [P]

    def _finish(self) -> None:
        axes = self._axes()
        self.register_buffer("pair_axes", axes, persistent=False)  # type: ignore[attr-defined]
        super()._finish()

    def _axes(self) -> Tensor | None:
        sections = self.mrope_section  # type: ignore[attr-defined]
        return mrope_axes(sections, interleaved=self.mrope_interleaved) if sections else None  # type: ignore[attr-defined]

    def _some_positions(self, device: torch.device) -> tuple[Tensor, ...]:
        text = super()._some_positions(device)
        if self.pair_axes is None:
            return text
        return *text, torch.tensor([[1, 0, 2], [2, 1, 0], [0, 2, 1]], device=device)

    def _rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if positions.dim() == 1:
            return super()._rows(positions)
        index = positions[self.pair_axes].T  # [T, P]
        cos, sin = self.float32_table.chunk(2, -1)
        return cos.gather(0, index), sin.gather(0, index), None


class _AxesOfErnie(_Axes):
    """Height and width take turns, then comes time."""

    def _axes(self) -> Tensor:
        height, width, time = self.mrope_section  # type: ignore[attr-defined]
        return torch.tensor([1, 2] * ((height + width) // 2) + [0] * time)


class _AxesOfBailing(_Axes):
    """As those of Ernie; the sections count time first."""

    def _axes(self) -> Tensor:
        time, height, width = self.mrope_section  # type: ignore[attr-defined]
        return torch.tensor([1, 2] * ((height + width) // 2) + [0] * time)


class _AxesOfPangu(_Axes):
    """vLLM has a list of them, for cos and again for sin."""

    def _axes(self) -> Tensor:
        listed = self.mrope_dim  # type: ignore[attr-defined]
        return torch.tensor(listed[: len(listed) // 2])

    def _some_positions(self, device: torch.device) -> tuple[Tensor, ...]:
        return super()._some_positions(device)[1:]  # text has three, too


class _Patches(_ByTable):
    """Llama 4's vision encoder: a square of patches, then the class token, which does not rotate.

    Half of the pairs rotate by a patch's column and half by its row, both from 1 on. vLLM's buffer
    holds cos + i sin.
    """

    def _compute_cos_sin_cache(self) -> Tensor:
        own = super(_ByTable, self)._compute_cos_sin_cache()  # complex [N + 1, 1, P]
        inv_freq = self.__dict__["_inv_freq"]
        patch = torch.arange(len(own) - 1, device=own.device)
        side = math.isqrt(len(patch))
        position_ids = torch.stack((patch % side + 1, patch // side + 1))
        position_ids = nn.functional.pad(position_ids, (0, 1))  # [2, N + 1]
        axes = axial_axes([len(inv_freq)] * 2, device=own.device)
        cos, sin = cos_sin(inv_freq.repeat(2), position_ids, axes=axes)
        self._compare("table", torch.complex(cos, sin)[:, None], own, 2.0**-20 * (1 + side))
        self.__dict__["_tables"] = [torch.cat((cos, sin), -1)]
        return torch.complex(cos, sin)[:, None]

    def _check_rotation(self, positions: Tensor) -> None:
        tokens, channels = self.float32_table.shape
        heads = torch.arange(tokens * 3 * channels, device=positions.device).sin()
        q, k = heads.view(1, tokens, 3, channels).split((2, 1), 2)
        for x, y in zip(self.forward(q, k), self._own_forward(q, k), strict=True):
            self._compare("rotation", x, y, 2.0**-20)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """query and key: [B, N + 1, H, D]."""
        cos, sin = self.float32_table.chunk(2, -1)
        return apply_rotary_qk(query, key, cos, sin, interleaved=True)

    forward_cpu = forward_cuda = forward_hip = forward_xpu = forward_oot = forward


class _GivenRows(_Rotation):
    """Rows of cos and sin come from the model: most vision encoders."""

    def _finish(self) -> None:
        x = torch.arange(2 * 3 * 2 * 8, dtype=torch.float32).sin().view(2, 3, 2, 8)
        cos, sin = torch.arange(2 * 3 * 4, dtype=torch.float32).cos().view(2, 3, 4)
        own = self._own_forward(x, cos, sin)
        self._compare("rotation", self.forward(x, cos, sin), own, 2.0**-20)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, H, D] or [S, H, D]; cos, sin: [S, P]."""
        layout = "thd" if x.dim() == 3 else "bshd"
        interleaved = not self.is_neox_style  # type: ignore[attr-defined]
        return apply_rotary(x, cos, sin, interleaved=interleaved, layout=layout)

    forward_cpu = forward_cuda = forward_hip = forward_xpu = forward_oot = forward


KINDS: dict[str, type[_Rotation]] = {
    "ApplyRotaryEmb": _GivenRows,
    "BailingMRotaryEmbedding": _AxesOfBailing,
    "DeepseekScalingRotaryEmbedding": _ByTable,
    "DeepseekV4ScalingRotaryEmbedding": _LastChannels,
    "DynamicNTKAlphaRotaryEmbedding": _ByTable,
    "DynamicNTKScalingRotaryEmbedding": _ByTable,
    "Ernie4_5_VLRotaryEmbedding": _AxesOfErnie,
    "Gemma4RotaryEmbedding": _ByTable,
    "LinearScalingRotaryEmbedding": _Linear,
    "Llama3RotaryEmbedding": _ByTable,
    "Llama4VisionRotaryEmbedding": _Patches,
    "MRotaryEmbedding": _Axes,
    "MRotaryEmbeddingInterleaved": _AxesOfPangu,
    "NTKScalingRotaryEmbedding": _ByTable,
    "Phi3LongRoPEScaledRotaryEmbedding": _LongRope,
    "RotaryEmbedding": _ByTable,
    "YaRNScalingRotaryEmbedding": _ByTable,
}
