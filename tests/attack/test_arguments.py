"""Arguments that do not fit: of every operator, and of the functions that call it. Either an error
that names the operator, before any byte is written, or the right numbers.
"""

import contextlib
import re
import warnings

import hostile
import torch
import walking
from budget import seconds
from calls import CALLS, OPERATORS, Draw, call_operator, described, overload_of, registered, written
from functions import (
    ENTRIES,
    FUNCTIONS,
    arguments_of,
    call_function,
    in_layout,
    of_operator,
    operator_of,
)
from hostile import Wrapper, is_dense
from torch._subclasses import FakeTensor
from truth import truth

import rope_ext

CALLED = [*((name, None) for name in OPERATORS), *ENTRIES]

BY_ANGLES = ("rope::cos_sin", "rope::cos_sin_cache")  # exact for any angle
# That PyTorch makes no such tensor.
NOT_MADE = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)
# What PyTorch says in its own words, of any operator.
WORDS_OF_PYTORCH = {
    r"Inference tensors cannot be saved for backward": "autograd, of what it is to keep",
    r"convert all Tensors to FakeTensors first": "a fake tensor beside real ones",
    r"ZeroTensors are immutable": "of every write",
    r"DefaultCPUAllocator: (can't allocate|not enough) memory": "libraries look for these words",
    r"Multiple dispatch failed": "of kinds of tensors that don't know each other",
    r"Storage size calculation overflowed|integer multiplication overflow": "too large to be",
}


def test_every_operator_and_function_has_a_case():
    assert registered() == set(CALLS)
    functions = {n for n in rope_ext.__all__ if type(getattr(rope_ext, n)) is type(attack)}
    assert functions == set(FUNCTIONS)


def test_an_error_before_any_write_or_the_right_numbers():
    walking.survive(__file__, seconds(20))


def attack(number, note):
    d = Draw(f"arguments {number}")
    name, function = CALLED[number % len(CALLED)]
    call = CALLS[name](d)
    if function:
        call = arguments_of(d, name, function, call)
    said, replaced = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(d.choice((0, 1, 1, 1, 1, 1, 2, 2, 3))):
            said += changed(d, name, function, call, replaced)
    fake = any(isinstance(x, FakeTensor) for x in call.values())
    if fake and (is_huge(call) or not hostile.is_printed(call)):
        return  # PyTorch prints a mixture that it refuses; where it can't, it leaves guards behind
    by = f"rope_ext.{function}" if function else name
    mode = d.choice((torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode))
    note(f"{by}, {' and '.join(said) or 'as it is'}; {mode.__name__}, {described(call)}")
    dispatching = dispatch_state()
    check(name, function, call, mode, replaced, fits=not said)
    assert dispatch_state() == dispatching, "the dispatcher is left in another state"


# ---- changes


def changed(d, name, function, call, replaced):
    """Changes an argument, and says what; what was there before is kept in `replaced`."""
    replaced += call.values()
    tensors = [n for n, x in call.items() if is_dense(x) and "Tensor" in str(kind_of(name, n))]
    if tensors and d.chance(0.05):
        hollow = hostile.FAKES.from_tensor if d.chance(0.5) else lambda t: t.to("meta")
        call |= {n: hollow(call[n]) for n in tensors}
        return ["all without data"]
    if len(tensors) > 1 and d.chance(0.1):
        return share_memory(d, call, *d.sample(tensors, 2))
    argument = d.choice(list(call))
    old = call[argument]
    kind = kind_of(name, argument)
    if kind is None:
        way, new = hostile.text.__name__, hostile.text(d, old)
    elif "Tensor" in kind:
        if not is_dense(old):
            old = d.indices(3, below=2, dtype=torch.int64)
        way = d.choice(list(hostile.TENSORS))
        new = old
        with contextlib.suppress(*NOT_MADE):
            new = hostile.TENSORS[way](d, old)
        if new is old or (new is None and way != "no_tensor"):
            return []
    else:
        ways = hostile.boolean, hostile.floating, hostile.dtype_argument, hostile.integer
        names = "bool" in kind, "float" in kind, argument == "dtype", True
        change = next(way for way, its in zip(ways, names, strict=True) if its)
        way, new = change.__name__, change(d, old)
        if argument == "dtype" and not function and type(new) is int and new not in (6, 7):
            return []  # PyTorch takes any number for a dtype, and looks behind the end of its list
    call[argument] = new
    return [f"{argument} by {way}"]


def kind_of(name, argument):
    """The type in the schema; None for words that the functions take."""
    extra = {"inplace": "bool", "layout": None, "cache_layout": None, "cos_k": "Tensor", "sin_k": "Tensor"}
    if argument in extra:
        return extra[argument]
    return next(str(a.type) for a in overload_of(name)._schema.arguments if a.name == argument)


def share_memory(d, call, first, second):
    """Puts two arguments into one buffer, over each other or side by side."""
    a, b = call[first], call[second]
    if a.shape == b.shape and a.dtype == b.dtype and d.chance(0.3):
        call[second] = a
        return [f"{second} is {first}"]
    sizes = [t.numel() * t.element_size() for t in (a, b)]
    if max(sizes) > 2**20 or a.dtype.is_complex or b.dtype.is_complex:
        return []
    before = d.randint(-(sizes[1] // 8) - 1, sizes[0] // 8 + 1) * 8
    places = max(0, -before), max(0, before)
    buffer = torch.zeros(max(p + s for p, s in zip(places, sizes, strict=True)) + 16, dtype=torch.uint8)
    pairs = [(first, a, places[0], sizes[0]), (second, b, places[1], sizes[1])]
    for argument, t, place, length in d.sample(pairs, 2):
        call[argument] = buffer[place : place + length].view(t.dtype).view(t.shape)
        call[argument].copy_(t)
    return [f"{first} and {second} in one buffer"]


# ---- what has to come of it


def check(name, function, call, mode, replaced, *, fits):
    memory = {id(x.untyped_storage()): x for x in map(inner, [*replaced, *call.values()]) if is_dense(x)}
    before = [(t, bytes_of(t), None if t.is_inference() else t._version) for t in memory.values()]
    meanings = {n: meaning(x) for n, x in call.items()}
    try:
        with mode():
            result = call_function(function, call) if function else call_operator(name, call)
    except Exception as error:
        assert not fits, f"refused: {error}"
        assert is_documented(error, function), f"{type(error).__name__}: {str(error)[:1000]}"
        for t, then, version in before:
            assert torch.equal(bytes_of(t), then), f"written, then refused: {error}"
            assert version is None or t._version == version, f"counted, then refused: {error}"
        return
    tensors = [x for n, x in call.items()
               if isinstance(x, torch.Tensor) and "Tensor" in str(kind_of(name, n))]  # fmt: skip
    hollow = [x.is_meta or isinstance(x, FakeTensor) for x in tensors]
    if any(hollow):
        assert all(hollow), "tensors without data were taken beside real ones"
        return
    if is_huge(call):
        return
    check_numbers(name, function, call, meanings, result)
    for t, then, _ in before:
        assert torch.equal(bytes_of(t), then), "a byte beside what is to be written"


def check_numbers(name, function, call, meanings, result):
    """Of the results, or of what is written, which then gets what was there before."""
    after = {n: inner(x) for n, x in call.items()}
    meanings = {n: as_number(kind_of(name, n), x) for n, x in meanings.items()}
    if type(meanings.get("dtype")) is int:
        meanings["dtype"] = {6: torch.float32, 7: torch.float64}[meanings["dtype"]]
    if function:
        name = operator_of(function, meanings)
        back = {n: x for n, x in meanings.items() if n in ("layout", "cache_layout")}
        meanings, after = of_operator(meanings), of_operator(after)
    results = () if result is None else (result,) if isinstance(result, torch.Tensor) else result
    results = [plain(x) for x in results]
    if function and "rotary" in function:
        places = dict(zip(("q", "k"), results, strict=False))
        results = [in_layout({**back, n: x})[n] for n, x in places.items()]
    expected = truth_of(name, meanings)
    wild = name not in BY_ANGLES and any(map(is_wild, meanings.values()))
    for want, got in zip(expected, results, strict=not written(name)):
        if want.allowed is None or not wild:
            want.check(got, "result")
    for argument, want in zip(written(name), expected, strict=False):
        t = after[argument].detach()
        want.check(plain(t), argument)
        with torch.inference_mode():
            t.copy_(meanings[argument])


def as_number(kind, x):
    """What PyTorch makes of it where a number belongs: of a bool, a 0-d tensor, a number of numpy."""
    if x is None or kind is None or "Tensor" in kind or isinstance(x, torch.dtype):
        return bool(x) if kind == "bool" else x
    return next(to for to in (bool, float, int) if to.__name__ in kind)(x)


def is_wild(x):
    """Whether float32 may overflow between such numbers and a result that doesn't."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype.itemsize == 1:
        return isinstance(x, float) and x != 0 and not 1e-9 < abs(x) < 1e9
    return not bool((x.double().abs() < 1e9).all())


def is_huge(call):
    """Whether a loop over some tensor would not come to an end."""
    tensors = [x for x in call.values() if isinstance(x, torch.Tensor) and not x.is_nested]
    return any(max(x.shape, default=0) > 2**20 for x in tensors)


def truth_of(name, call):
    cos, sin = (call.pop(n, None) for n in ("cos_k", "sin_k"))
    if cos is None:
        return truth(name, call)
    of_k = truth(name, {**call, "cos": cos, "sin": sin})
    return [truth(name, call)[0], of_k[1]]


def dispatch_state():
    keys = torch._C._dispatch_tls_local_exclude_set(), torch._C._dispatch_tls_local_include_set()
    return *(k.raw_repr() for k in keys), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def is_documented(error, function):
    text = str(error)
    if any(re.search(words, text) for words in WORDS_OF_PYTORCH):
        return True
    if not isinstance(error, RuntimeError | ValueError | TypeError):
        return False
    if "INTERNAL ASSERT" in text or "API call failed" in text:
        return False
    if function:
        return re.search(r"^rope(_ext\.|::)\w+(\.out)?: expected .+, got ", text, re.S) is not None
    return re.search(r"rope(::|\.)\w+", text) is not None


# ---- tensors as they are meant


def inner(x):
    return x.inner if isinstance(x, Wrapper) else x


def plain(x):
    """The ordinary tensor of the numbers that x stands for."""
    with torch._C.DisableTorchFunctionSubclass():
        return inner(x).detach().resolve_conj().resolve_neg().as_subclass(torch.Tensor)


def meaning(x):
    """A copy of what an argument is before the call; without data, or too large, as it is."""
    x = inner(x)
    if isinstance(x, torch.Tensor) and x._is_zerotensor() and x.numel() < 2**22:
        return torch.zeros(x.shape, dtype=x.dtype)
    if not is_dense(x) or x.numel() > 2**22:
        return x
    with contextlib.suppress(NotImplementedError):  # nothing copies an int5
        return plain(x).clone(memory_format=torch.contiguous_format)
    return x


def bytes_of(t):
    """All bytes of the memory that t lies in."""
    with torch.inference_mode():
        return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


if __name__ == "__main__":
    walking.main(__file__, attack)
