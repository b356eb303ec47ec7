"""A model's rotary module with exact tables of cos and sin: patch(model, tables=True).

The module stays the same object, and becomes an instance of a class that has ExactTables as a base.
Its buffers inv_freq have the values that its config defines, in float32 whatever the dtype of the
model, and also after to_empty(). Its tables are those of the exact angles, in float32, or float64
if the model is in float64.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rope_ext.angles import cos_sin
from rope_ext.integrations.transformers.table_recognition import ADDED, Recognized, Table
from rope_ext.module.frequencies_by_length import DynamicNtk, longest

# The most by which bfloat16 (relative) and float16 (absolute) change a frequency.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-24


class ExactTables(nn.Module):
    """A base of the classes of rotary modules with exact tables. All it adds begins with ADDED."""

    _rope_ext_tables: dict[str | None, Table]  # by layer type
    _rope_ext_made: dict[str, Tensor]  # the values of all buffers by name, on the CPU
    _rope_ext_own: dict[str, Tensor]  # the module's own buffers, cast and moved as without rope_ext

    def _rope_ext_begin(self, recognized: Recognized, name: str) -> None:
        """Gives the buffers of a module called `name` their values, and adds others."""
        made = recognized.buffers
        self._rope_ext_tables, self._rope_ext_made = recognized.tables, made
        own = {n: buffer for n, buffer in self._buffers.items() if n in made and buffer is not None}
        self._rope_ext_own = own
        for added in made.keys() - self._buffers.keys():
            self.register_buffer(added, None, persistent=False)
        self._rope_ext_fill(next(iter(own.values())).device)
        by_length = {f"{t.prefix}inv_freq" for t in recognized.tables.values() if t.by_length}
        if any(not _is_rounded(own[n], made[n]) for n in own.keys() - by_length):
            warnings.warn(
                f"patch: expected module {name!r} to have the inv_freq of its config, got other "
                "values (from to_empty(), or written into it): with tables=True it has those of "
                "the config now",
                stacklevel=4,
            )

    def _rope_ext_end(self) -> None:
        """Brings back the module's own buffers."""
        self._buffers.update(vars(self).get(f"{ADDED}own", {}))
        for name in [name for name in (*self._buffers, *vars(self)) if name.startswith(ADDED)]:
            delattr(self, name)

    def _rope_ext_fill(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode can't be written later
            for name, made in self._rope_ext_made.items():
                self._buffers[name] = made.to(device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves to another device, but keeps dtypes, and the values after to_empty()."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if tensor.is_meta else tensor.to(result.device)

        before = self._rope_ext_own
        with torch.inference_mode(False):
            super()._apply(moved, recurse)
            self._rope_ext_own = own = {name: fn(buffer) for name, buffer in before.items()}
            if any(before[name].is_meta and not buffer.is_meta for name, buffer in own.items()):
                self._rope_ext_fill(next(iter(own.values())).device)
                for name, buffer in own.items():
                    buffer.copy_(self._rope_ext_made[name])
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles what the module would have without rope_ext."""
        made, arguments, state, *rest = super().__reduce_ex__(protocol)
        state = {n: value for n, value in state.items() if not n.startswith(ADDED)}
        buffers = {**state["_buffers"], **self._rope_ext_own}
        state["_buffers"] = {n: b for n, b in buffers.items() if not n.startswith(ADDED)}
        names = "_non_persistent_buffers_set"
        state[names] = {n for n in state[names] if not n.startswith(ADDED)}
        return (made, arguments, state, *rest)


def _is_rounded(own: Tensor, made: Tensor) -> bool:
    """Whether a module's own buffer has the values, perhaps rounded to the model's dtype."""
    near = {"rtol": _RELATIVE, "atol": _ABSOLUTE}
    return own.is_meta or torch.allclose(own.detach().cpu().float(), made.float(), **near)


class TableMethod(NamedTuple):
    """The forward of a rotary module's class, and what replaces it (see MethodCopy)."""

    original: Callable[..., Any]
    function: Callable[..., Any]
    rotations: dict[str, Any] = {}  # noqa: RUF012
    static: bool = False

    def bind(self) -> None:
        """It needs no globals."""


def table_methods(own: type) -> dict[str, TableMethod]:
    """The methods of a rotary module's class that are replaced."""
    return {"forward": TableMethod(own.forward, exact_tables)}  # type: ignore[attr-defined]


def exact_tables(
    self: ExactTables, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """What the module's own forward returns, but without its rounding of angles and to x's dtype.

    Args:
        x: its dtype counts.
        position_ids: of the shapes that the module's own forward takes, in tokens.
        layer_type: for modules with frequencies for each layer type.
    """
    tables = self._rope_ext_tables
    table = tables.get(layer_type) or tables.get(None)
    name = type(self).__name__
    if table is None:
        known = ", ".join(map(repr, tables))
        raise ValueError(f"{name}: expected layer_type to be one of {known}, got {layer_type!r}")
    form, positions, count, several = table.form, position_ids, 1, False
    if form.axis is not None:
        positions, several = position_ids.movedim(form.axis, 0), True
        count = positions.shape[0]
        if form.axis == 0 and (position_ids.dim() == 2 or count == 1):  # the same for all axes
            positions = position_ids if position_ids.dim() == 2 else position_ids[0]
            count, several = next(iter(form.columns)), False
    if count not in form.columns:
        known = " or ".join(map(str, form.columns))
        raise ValueError(
            f"{name}: expected position_ids to have {known} coordinates, got {count} in shape "
            f"{list(position_ids.shape)}"
        )
    device = position_ids.device
    pairs = getattr(self, table.added(f"pairs_{count}")).to(device)
    cos, sin = cos_sin(
        frequencies(self, table, position_ids).index_select(0, pairs),
        positions,
        axes=getattr(self, table.added(f"axes_{count}")).to(device) if several else None,
        attention_scaling=getattr(self, f"{table.prefix}attention_scaling", 1.0),
        dtype=torch.float64 if x.dtype == torch.float64 else None,
    )
    if form.is_unsqueezed:
        cos, sin = cos[None], sin[None]
    return torch.complex(cos, sin) if form.is_complex else (cos, sin)


def frequencies(module: ExactTables, table: Table, position_ids: Tensor) -> Tensor:
    """The frequencies [P] for these positions, without waiting for their values."""
    device = position_ids.device
    inv_freq: Tensor = getattr(module, f"{table.prefix}inv_freq").to(device)
    by_length = table.by_length
    if by_length is None:
        return inv_freq
    length = longest(position_ids, device)
    if by_length.factor is None:
        long: Tensor = getattr(module, table.added("long_inv_freq")).to(device)
        return torch.where(length > by_length.original, long, inv_freq)
    exponents = getattr(module, table.added("exponents")).to(device)
    ntk = DynamicNtk(by_length.original, by_length.factor, by_length.base, exponents, inv_freq)
    seen: Tensor = getattr(module, table.added("max_seq_len_cached"))
    length = ntk.longest_so_far(seen.to(device), length)
    seen.copy_(length)
    return ntk.frequencies(length)
