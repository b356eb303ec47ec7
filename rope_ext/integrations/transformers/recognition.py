"""Which rotation a model's own function is: found by its parameters, and by what it computes.

The names of a function's parameters select the forms that it may have (rotations.py). It is then
called with small tensors of irregular numbers, and each form with each way to pair channels as
well: the first that gives the function's own results wherever the function gives any is its
rotation. So nothing depends on a model's name or on how its code is written, and a function that
does anything else, such as turning by other columns of the tables, is not recognized.
"""

import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rope_ext.integrations.transformers import rotations
from rope_ext.integrations.transformers.rotations import ALL_PAIRS, Pairs

# Of the probes: all different, so that no axis can be taken for another.
BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 5, 4, 3, 16
# Of tables: all channels of a head or some, with one angle a channel or one a pair.
WIDTHS = (HEAD_DIM, HEAD_DIM // 2, HEAD_DIM // 4)

# Of a result, in units of the dtype's eps times the largest |x| (|cos| + |sin|): the functions
# round each product and the sum, some tables too; a wrong pair or column is off by about 1 / eps.
TOLERANCE = 8

_INTEGERS = (torch.int32, torch.int64)

Probe = tuple[list[Any], dict[str, Any]]


class Rotation(NamedTuple):
    """What a function computes, and what computes the same with rope_ext."""

    convention: str
    replacement: Callable[..., Any]
    form: Callable[[Pairs], Callable[..., Any]]
    pairs: Pairs


class Form(NamedTuple):
    label: str  # for reports; '': q and k
    fill: Callable[[Pairs], Callable[..., Any]]
    probes: Callable[["Numbers"], Iterator[Probe]]


class Numbers:
    """Tensors of irregular numbers within 2, the same each time; nothing random is drawn for them,
    which a transform of functions may forbid.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.used = 0

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        index = torch.arange(self.used, self.used + size, dtype=torch.float64, device="cpu")
        self.used += size
        return (2 * torch.sin(index * index / math.sqrt(2))).view(shape).to(self.dtype)

    def complex(self, *shape: int) -> Tensor:
        return torch.complex(self(*shape).float(), self(*shape).float())

    def pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        return self(*shape), self(*shape)


def recognize(function: Callable[..., Any] | nn.Module) -> Rotation | None:
    """The rotation that a function, or a hook of the `kernels` package around one, computes."""
    if isinstance(function, nn.Module):
        return recognize_function(type(function))
    return _recognize_among(_FORMS, function)


def recognize_function(hook: type[nn.Module]) -> Rotation | None:
    """As :func:`recognize`, for the class of a hook: its own forward, whatever kernel it now has.

    A hook's forward takes the function's arguments after itself, which it does not use.
    """
    return _recognize_among(_FORMS, types.MethodType(hook.forward, hook))


def recognize_method(function: Callable[..., Any]) -> Rotation | None:
    """As :func:`recognize`, for the functions that models keep in their attention's class."""
    return _recognize_among(_METHOD_FORMS, function)


_known: WeakKeyDictionary[Callable[..., Any], Rotation | None] = WeakKeyDictionary()


def _recognize_among(forms: tuple[Form, ...], function: Callable[..., Any]) -> Rotation | None:
    key = getattr(function, "__func__", function)
    if key not in _known:
        # Numbers on the CPU, even while a model is traced with tensors that have none.
        with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
            _known[key] = _first_match(forms, function)
    return _known[key]


def _first_match(forms: tuple[Form, ...], function: Callable[..., Any]) -> Rotation | None:
    try:
        parameters = _names_and_kinds(function)
    except (TypeError, ValueError):  # has no signature
        return None
    for form in forms:
        if _names_and_kinds(form.fill(ALL_PAIRS[0])) != parameters:
            continue
        expected = [
            (probe, result)
            for dtype in (torch.float32, torch.bfloat16)
            for probe in form.probes(Numbers(dtype))
            if (result := _call(function, probe)) is not None
        ]
        for pairs in ALL_PAIRS:
            replacement = _with_defaults_of(function, form.fill(pairs))
            if expected and all(_agree(_call(replacement, p), r, p) for p, r in expected):
                convention = f"{pairs.name}; {form.label}" if form.label else pairs.name
                return Rotation(convention, replacement, form.fill, pairs)
    return None


def _names_and_kinds(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


def _with_defaults_of(
    function: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters.values()
    replacement.__defaults__ = tuple(p.default for p in parameters if p.default is not p.empty)
    return replacement


def _call(function: Callable[..., Any], probe: Probe) -> tuple[Tensor | None, ...] | None:
    """The results; None where the function can't be called with such arguments."""
    arguments, keywords = probe
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        results = function(*copies, **keywords)
    except Exception:
        return None
    results = results if isinstance(results, tuple) else (results,)
    unchanged = all(
        torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if isinstance(a, Tensor)
    )
    tensors = all(r is None or isinstance(r, Tensor) for r in results)
    return results if unchanged and tensors else None


def _agree(
    results: tuple[Tensor | None, ...] | None,
    expected: tuple[Tensor | None, ...],
    probe: Probe,
) -> bool:
    if results is None or len(results) != len(expected):
        return False
    inputs = [a for a in probe[0] if isinstance(a, Tensor) and a.dtype not in _INTEGERS]
    largest = max(float(a.abs().max()) for a in inputs)
    eps = max(torch.finfo(a.dtype).eps for a in inputs)
    for result, other in zip(results, expected, strict=True):
        if result is None or other is None:
            if result is not other:
                return False
            continue
        if result.shape != other.shape:
            return False
        if not (result.double() - other.double()).abs().max() <= TOLERANCE * eps * largest**2:
            return False
    return True


# ----------------------------------------------------------------------------------------- probes


def _q_and_k(numbers: Numbers, *position_ids: Any) -> Iterator[Probe]:
    for width in WIDTHS:
        for batch in (1, BATCH):
            tables = numbers.pair(batch, SEQ, width)
            q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
            yield [q, k, *tables, *position_ids], {}
            yield [q, k, *tables, *position_ids], {"unsqueeze_dim": 1}
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            yield [q, k, *tables, *position_ids], {"unsqueeze_dim": 2}
        q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
        yield [q, k, *numbers.pair(SEQ, width), *position_ids], {"unsqueeze_dim": 0}


def _q_and_k_in_every_way(numbers: Numbers) -> Iterator[Probe]:
    yield from _q_and_k(numbers)
    for width in WIDTHS:
        q, k = numbers(BATCH, HEADS, SEQ - 2, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
        yield [q, k, *numbers.pair(BATCH, SEQ, width)], {}
        yield [numbers(BATCH, HEADS, SEQ, HEAD_DIM), None, *numbers.pair(BATCH, SEQ, width)], {}


def _q_and_k_position_ids(numbers: Numbers) -> Iterator[Probe]:
    yield from _q_and_k(numbers)
    yield from _q_and_k(numbers, torch.arange(SEQ))


def _q_k_and_v(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        qkv = [numbers(BATCH, HEADS, SEQ, HEAD_DIM) for _ in range(3)]
        for position_ids in (torch.tensor([[3, 0, 1, 6, 2]]), torch.arange(2 * SEQ).view(2, SEQ)):
            yield [*qkv, *numbers.pair(2 * SEQ, width), position_ids], {}
        swapped = [x.transpose(1, 2) for x in qkv]
        yield [*swapped, *numbers.pair(2 * SEQ, width), position_ids], {"unsqueeze_dim": 2}


def _one_tensor(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        for batch in (1, BATCH):
            tables = numbers.pair(batch, SEQ, width)
            x = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
            yield [x, *tables], {}
            yield [x, *tables], {"unsqueeze_dim": 1}
            yield [x.transpose(1, 2), *tables], {"unsqueeze_dim": 2}


def _one_tensor_sin_first(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        for batch in (1, BATCH):
            yield [numbers(BATCH, SEQ, HEADS, HEAD_DIM), *numbers.pair(batch, SEQ, width)], {}


def _one_tensor_without_heads(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        yield [numbers(BATCH, SEQ, HEAD_DIM), *numbers.pair(BATCH, SEQ, width)], {}


def _axes_of_one_tensor(numbers: Numbers) -> Iterator[Probe]:
    for axes in (1, 2, 4):
        x, tables = numbers(BATCH, SEQ, HEADS, HEAD_DIM), numbers.pair(BATCH, SEQ, HEAD_DIM)
        position_ids = torch.zeros(BATCH, SEQ, axes, dtype=torch.int64)
        yield [x, *tables, position_ids], {}
        yield [x, *tables, position_ids], {"unsqueeze_dim": 2}
        yield [x.transpose(1, 2), *tables, position_ids], {"unsqueeze_dim": 1}


def _heads_last(numbers: Numbers) -> Iterator[Probe]:
    for width in WIDTHS:
        q, k = numbers(SEQ, HEADS, HEAD_DIM), numbers(SEQ, KV_HEADS, HEAD_DIM)
        yield [q, k, *numbers.pair(SEQ, width)], {}


def _heads_first(numbers: Numbers) -> Iterator[Probe]:
    for shape in ((SEQ,), (1, SEQ), (1, 1, SEQ), (BATCH, 1, SEQ)):
        for width in WIDTHS:
            q, k = numbers(BATCH, HEADS, SEQ, HEAD_DIM), numbers(BATCH, KV_HEADS, SEQ, HEAD_DIM)
            yield [q, k, *numbers.pair(*shape, width)], {}


def _after_prefix(numbers: Numbers) -> Iterator[Probe]:
    for prefix in (0, 2):
        q = numbers(BATCH, HEADS, SEQ + prefix, HEAD_DIM)
        k = numbers(BATCH, KV_HEADS, SEQ + prefix, HEAD_DIM)
        yield [q, k, *numbers.pair(SEQ, HEAD_DIM)], {}
        yield [q, k, *numbers.pair(BATCH, 1, SEQ, HEAD_DIM)], {}


def _memory(numbers: Numbers) -> Iterator[Probe]:
    for repeats, excluded in ((0, 2), (1, 0), (1, 3), (2, 0), (3, 2)):
        q = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
        k = numbers(BATCH, KV_HEADS, repeats * SEQ + excluded, HEAD_DIM)
        keywords = {"num_k_exclude_rope": excluded, "repeat_freqs_k": repeats > 1}
        yield [q, k, *numbers.pair(SEQ, HEAD_DIM)], keywords
        yield [q, k, *numbers.pair(1, 1, SEQ, HEAD_DIM)], keywords


def _memory_groups(numbers: Numbers) -> Iterator[Probe]:
    for repeats, stay, excluded in ((1, 0, 0), (1, 2, 3), (3, 2, 0), (2, 0, 1)):
        q = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
        k = numbers(BATCH, HEADS, repeats * (stay + 4) + excluded, HEAD_DIM)
        keywords = {"num_k_exclude_rope": excluded, "repeat_freqs_k": repeats}
        for ones in ((), (1, 1)):
            tables = numbers.pair(*ones, SEQ, HEAD_DIM) + numbers.pair(*ones, 4, HEAD_DIM)
            yield [q, k, *tables], keywords


def _complex_heads_last(numbers: Numbers) -> Iterator[Probe]:
    for batch in (1, BATCH):
        q, k = numbers(BATCH, SEQ, HEADS, HEAD_DIM), numbers(BATCH, SEQ, KV_HEADS, HEAD_DIM)
        yield [q, k, numbers.complex(batch, SEQ, HEAD_DIM // 2)], {}


def _complex_heads_first(numbers: Numbers) -> Iterator[Probe]:
    for (q, k, freqs), _ in _complex_heads_last(numbers):
        yield [q.transpose(1, 2), k.transpose(1, 2), freqs], {}


def _complex_of_tokens(numbers: Numbers) -> Iterator[Probe]:
    q, k = numbers(BATCH, SEQ, HEADS, HEAD_DIM), numbers(BATCH, SEQ, KV_HEADS, HEAD_DIM)
    for shape in ((SEQ, HEAD_DIM // 2), (1, SEQ, 1, HEAD_DIM // 2)):
        yield [q, k, numbers.complex(*shape)], {}


def _positions_of_one_tensor(numbers: Numbers) -> Iterator[Probe]:
    x = numbers(BATCH, HEADS, SEQ, HEAD_DIM)
    yield [x, torch.tensor([3, 0, 7, 1, 2])], {}
    yield [x, torch.arange(BATCH * SEQ).view(BATCH, 1, SEQ).expand(BATCH, HEADS, SEQ)], {}


def _method_on_hidden_states(numbers: Numbers) -> Iterator[Probe]:
    module = types.SimpleNamespace(num_heads=HEADS, head_size=HEAD_DIM)
    for rows in (SEQ, SEQ + 2):
        hidden_states = numbers(BATCH, SEQ, HEADS * HEAD_DIM)
        yield [module, hidden_states, numbers(2, rows, 1, 1, HEAD_DIM)], {}


def _method_with_sinusoidal_pos(numbers: Numbers) -> Iterator[Probe]:
    q, k, v = (numbers(BATCH, HEADS, SEQ, HEAD_DIM) for _ in range(3))
    sinusoidal_pos = numbers(1, 1, SEQ, HEAD_DIM)
    yield [sinusoidal_pos, q, k], {}
    yield [sinusoidal_pos, q, k, v], {}


_FORMS = (
    Form("", rotations.q_and_k, _q_and_k_in_every_way),
    Form("q shorter than k", rotations.q_shorter_than_k, _q_and_k_in_every_way),
    Form("", rotations.q_and_k_unused_position_ids, _q_and_k_position_ids),
    Form("", rotations.q_and_optional_k, _q_and_k_in_every_way),
    Form("q, k and v", rotations.q_k_and_v, _q_k_and_v),
    Form("one tensor", rotations.one_tensor, _one_tensor),
    Form("one tensor", rotations.one_tensor_sin_first, _one_tensor_sin_first),
    Form("no heads", rotations.one_tensor_without_heads, _one_tensor_without_heads),
    Form("a part of each head for an axis", rotations.axes_of_one_tensor, _axes_of_one_tensor),
    Form("vision", rotations.q_and_k_heads_last, _heads_last),
    Form("2D", rotations.q_and_k_heads_first, _heads_first),
    Form("after a prefix", rotations.q_and_k_after_prefix, _after_prefix),
    Form("2D, memory", rotations.q_and_k_memory, _memory),
    Form("2D, memory in groups", rotations.q_and_k_memory_groups, _memory_groups),
    Form("complex", rotations.complex_heads_last, _complex_heads_last),
    Form("complex", rotations.complex_heads_first, _complex_heads_first),
    Form("complex", rotations.complex_of_tokens, _complex_of_tokens),
    Form("from positions", rotations.positions_of_one_tensor, _positions_of_one_tensor),
)

_METHOD_FORMS = (
    Form("on hidden states", rotations.method_on_hidden_states, _method_on_hidden_states),
    Form("sin and cos in one", rotations.method_with_sinusoidal_pos, _method_with_sinusoidal_pos),
)
