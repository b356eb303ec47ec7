"""Finds out how a rotary module of a model makes its tables of cos and sin.

A copy of the module gets other frequencies and is called with a few small positions. Each column of
its tables then has to be cos and sin of one frequency times one coordinate of a token's position. A
call with a large position tells whether its frequencies depend on the length of the sequence. The
name of a class only decides whether a module that is not recognized is refused or ignored.
"""

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rope_ext.frequencies.ntk_aware import stretched_by
from rope_ext.integrations.patching.method_copies import UnrecognizedRotation

_NAMED_ROTARY = re.compile(r"Ro(tary|[pP][eE])\w*Embedding")
_PARAMETERS = ["x", "position_ids", "layer_type"]
_MOST_COORDINATES = 4  # of a token's position
ADDED = "_rope_ext_"  # the beginning of the names of what is added to a module
_ANGLE_ERROR = 1e-4  # radians; frequencies of a probe differ by more, its angles are below pi
_FREQUENCY_ERROR = 1e-5  # relative: base and power are float32


@dataclass(frozen=True)
class Columns:
    """The frequency and the coordinate of each column of a table."""

    pairs: tuple[int, ...]
    coordinates: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What a rotary module takes and returns."""

    # The dimension of position_ids that has a token's coordinates: 0 in [A, B, S], -1 in [N, A] and
    # [B, N, A]. None: a token has one position.
    axis: int | None
    columns: dict[int, Columns]  # by the number of coordinates
    dims: int  # of position_ids
    is_complex: bool  # cos + i sin instead of cos, sin
    is_unsqueezed: bool  # [1, N, W] for position_ids [N, A]


@dataclass(frozen=True)
class ByLength:
    """Frequencies that depend on the length of the sequence."""

    original: int  # the length up to which they are inv_freq, in tokens
    # Of dynamic NTK: the longest sequence so far stretches them. None: longer sequences have other
    # frequencies, long_inv_freq.
    factor: float | None = None
    base: float = 0.0


@dataclass(frozen=True)
class Table:
    """The tables of one layer type."""

    prefix: str  # of the names of its buffers
    form: Form
    by_length: ByLength | None

    def added(self, name: str) -> str:
        """The name of a buffer that rope_ext adds to the module."""
        return f"{ADDED}{self.prefix}{name}"


@dataclass(frozen=True)
class Recognized:
    """A rotary module: its tables by layer type, and its buffers with the values of its config."""

    tables: dict[str | None, Table]
    buffers: dict[str, Tensor]  # on the CPU


def makes_tables(module: nn.Module) -> bool:
    """Whether a module looks like one that makes tables of cos and sin for rotations."""
    if type(module).__module__.partition(".")[0] in ("torch", "rope_ext"):
        return False
    return bool(_NAMED_ROTARY.search(type(module).__name__)) or (
        any(name.endswith("inv_freq") for name in module._buffers) and _takes_positions(module)
    )


def recognize(module: nn.Module, name: str) -> Recognized:
    """How a module that :func:`makes_tables` makes them. Raises UnrecognizedRotation."""
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return _recognized(module)
    except _Unknown as reason:
        raise UnrecognizedRotation(
            "patch: expected tables=True for modules that make cos and sin of position_ids times "
            f"inv_freq, got module {name!r}, {type(module).__name__}, {reason}: patch without "
            "tables, and with tables=True those parts of the model that do not have it; nothing "
            "has been changed"
        ) from reason.__cause__


class _Unknown(Exception):
    """Why a module is not recognized: a relative clause."""


def _takes_positions(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return parameters == _PARAMETERS[: len(parameters)] and len(parameters) >= 2


def _recognized(module: nn.Module) -> Recognized:
    if not _takes_positions(module):
        parameters = ", ".join([*inspect.signature(type(module).forward).parameters][1:])
        raise _Unknown(f"whose forward({parameters}) does not take x and position_ids")
    if learned := [name for name, _ in module.named_parameters()]:
        raise _Unknown(f"whose tables depend on the parameters {', '.join(learned)}")
    frequencies = [n for n in module._buffers if n.endswith("inv_freq") and "original_" not in n]
    if not frequencies:
        raise _Unknown("which has no buffer inv_freq")
    fresh = remade(module)
    tables: dict[str | None, Table] = {}
    buffers = {n: buffer for n, buffer in fresh._buffers.items() if buffer is not None}
    for name in frequencies:
        prefix = name.removesuffix("inv_freq")
        layer_type = prefix.removesuffix("_") or None
        form = _form(fresh, prefix, layer_type)
        by_length, added = _by_length(fresh, prefix, layer_type, form)
        table = tables[layer_type] = Table(prefix, form, by_length)
        for count, columns in form.columns.items():
            added[f"pairs_{count}"] = torch.tensor(columns.pairs)
            if count > 1:
                added[f"axes_{count}"] = torch.tensor(columns.coordinates)
        buffers |= {table.added(name): tensor for name, tensor in added.items()}
    return Recognized(tables, buffers)


def remade(module: nn.Module) -> nn.Module:
    """The module as its class makes it from its config."""
    config = getattr(module, "config", None)
    if config is None:
        raise _Unknown("which has no config")
    try:
        return type(module)(config)
    except Exception as error:
        raise _Unknown(f"which its class does not make from its config ({error!r})") from error


# ------------------------------------------------------------------------ columns of the tables


def _form(fresh: nn.Module, prefix: str, layer_type: str | None) -> Form:
    """What the module takes and returns, found out with other frequencies."""
    probe = copy.deepcopy(fresh)
    count = getattr(probe, f"{prefix}inv_freq").numel()
    inv_freq = torch.linspace(0.05, 0.39, count)  # 7 * 0.39 is below pi
    for kind in ("", "original_"):
        if f"{prefix}{kind}inv_freq" in probe._buffers:
            probe._buffers[f"{prefix}{kind}inv_freq"] = inv_freq.clone()
    setattr(probe, f"{prefix}long_inv_freq", inv_freq.clone())  # of longrope
    scaling = getattr(probe, f"{prefix}attention_scaling", 1.0)
    # None last: a module of several coordinates also takes one for all of them
    for axis, dims in ((0, 3), (-1, 2), (-1, 3), (None, 2)):
        counts = (1,) if axis is None else range(2, _MOST_COORDINATES + 1)
        found = {n: _known(probe, layer_type, axis, dims, n, inv_freq, scaling) for n in counts}
        if known := {n: each for n, each in found.items() if each is not None}:
            columns = {n: columns for n, (columns, *_) in known.items()}
            _, is_complex, is_unsqueezed = next(iter(known.values()))
            return Form(axis, columns, dims, is_complex, is_unsqueezed)
    raise _Unknown("whose tables are not cos and sin of position_ids times its inv_freq")


def _known(
    probe: nn.Module,
    layer_type: str | None,
    axis: int | None,
    dims: int,
    count: int,
    inv_freq: Tensor,
    scaling: float,
) -> tuple[Columns, bool, bool] | None:
    """The columns, is_complex and is_unsqueezed of a module that takes such position_ids."""
    tokens = (6,) if axis == -1 and dims == 2 else (2, 3)
    places = torch.randint(1, 8, (count, *tokens), generator=torch.Generator().manual_seed(0))
    position_ids = places[0] if axis is None else places.movedim(0, axis)
    try:
        made = call(copy.deepcopy(probe), torch.zeros(2, 3, 8), position_ids, layer_type)
        is_complex = isinstance(made, Tensor)
        cos, sin = (made.real, made.imag) if is_complex else made
        is_unsqueezed = (1, *tokens) == cos.shape[:-1]
        if cos.shape != sin.shape or cos.shape[:-1] not in (tokens, (1, *tokens)):
            return None
    except Exception:  # it does not take such positions
        return None
    rows = cos.flatten(0, -2) / scaling, sin.flatten(0, -2) / scaling
    columns = _columns(*rows, places.flatten(1), inv_freq)
    return columns and (columns, is_complex, is_unsqueezed)


def _columns(cos: Tensor, sin: Tensor, places: Tensor, inv_freq: Tensor) -> Columns | None:
    """cos, sin [T, W], places [A, T]; None if a column has no pair, or a pair no column."""
    angles = (places[:, :, None] * inv_freq).movedim(0, 1).flatten(1)  # [T, A * P]
    near = (cos[:, :, None] - angles.cos()[:, None]).abs() < _ANGLE_ERROR
    near &= (sin[:, :, None] - angles.sin()[:, None]).abs() < _ANGLE_ERROR
    match = near.all(0)  # [W, A * P]
    of = match.int().argmax(-1)
    pairs, coordinates = of % len(inv_freq), of // len(inv_freq)
    if not bool((match.sum(-1) == 1).all()) or len(pairs.unique()) < len(inv_freq):
        return None
    return Columns((*pairs.tolist(),), (*coordinates.tolist(),))


def call(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Any:
    forward: Callable[..., Any] = module.forward
    return forward(x, position_ids) if layer_type is None else forward(x, position_ids, layer_type)


# --------------------------------------------------------------------- frequencies by the length


def _by_length(
    fresh: nn.Module, prefix: str, layer_type: str | None, form: Form
) -> tuple[ByLength | None, dict[str, Tensor]]:
    """How the frequencies depend on the length of the sequence, and the tensors for that."""
    short = getattr(fresh, f"{prefix}inv_freq")
    parameters = getattr(fresh.config, "rope_parameters", None) or {}
    parameters = parameters if layer_type is None else parameters.get(layer_type) or {}
    original = parameters.get("original_max_position_embeddings") or 0
    longest = max(getattr(fresh, "max_seq_len_cached", 0), original, 1)
    scaling = getattr(fresh, f"{prefix}attention_scaling", 1.0)

    def at(length: int) -> Tensor:
        module, shape = copy.deepcopy(fresh), [1] * form.dims
        if form.axis is not None:
            shape[form.axis] = next(iter(form.columns))
        last = torch.full(shape, length - 1)
        try:
            made = call(module, torch.zeros(1, 1, 8), last, layer_type)
        except Exception as error:
            raise _Unknown(f"whose forward raises {error!r} for a long sequence") from error
        amplitude = made.abs() if form.is_complex else torch.hypot(*made)
        if not torch.allclose(amplitude, torch.tensor(float(scaling)), rtol=_ANGLE_ERROR):
            raise _Unknown("whose attention_scaling depends on the length")
        frequencies: Tensor = getattr(module, f"{prefix}inv_freq")
        return frequencies

    lengths = 2 * longest + 1, 3 * longest + 1
    long = [at(length) for length in lengths]
    if torch.equal(long[0], short):
        return None, {}
    rope_type = getattr(fresh, "rope_type", None)
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(layer_type)
    if rope_type == "longrope" and torch.equal(*long) and original:
        return ByLength(original), {"long_inv_freq": long[0]}
    if rope_type == "dynamic":
        original, factor = fresh.original_max_seq_len, parameters["factor"]
        exponents = torch.arange(0, 2 * len(short), 2, dtype=torch.int64).float() / (2 * len(short))
        ntk = ByLength(original, factor, parameters["rope_theta"])
        options = {"factor": factor, "original": original, "base": ntk.base}
        ours = (stretched_by(torch.tensor(length), exponents, **options) for length in lengths)
        if all(
            torch.allclose(mine, theirs, rtol=_FREQUENCY_ERROR, atol=0)
            for mine, theirs in zip(ours, long, strict=True)
        ):
            cached = torch.full((), original, dtype=torch.int64)
            return ntk, {"exponents": exponents, "max_seq_len_cached": cached}
    raise _Unknown(f"whose frequencies depend on the length by the unknown rope_type {rope_type!r}")
