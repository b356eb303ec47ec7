"""The allowed outcomes of a call: an error that names the operator, before any byte is written; or
the right numbers, without any other write.
"""

import contextlib
import functools
import re

import torch
from calls import RECORDS, call_operator
from expected_results import expected_results
from functions import call_function, in_layout, of_operator, operator_of
from invalid_arguments import OF_NUMBERS, Wrapper, is_dense
from torch._subclasses import FakeTensor

MANY = 2**20  # a loop over more sequences or tokens takes too long
EXACT_FOR_ANY_NUMBER = ("rope::cos_sin", "rope::cos_sin_cache")
OF_FUNCTIONS = {"inplace": "bool", "layout": None, "cache_layout": None}
# PyTorch's own errors, for any operator.
WORDS_OF_PYTORCH = {
    r"Inference tensors cannot be saved for backward": "autograd, of what it is to keep",
    r"convert all Tensors to FakeTensors first": "a fake tensor beside real ones",
    r"Multiple dispatch failed|already associated to a python object": "two foreign subclasses",
    r"Cannot set version_counter for inference tensor": "a view of a subclass in inference mode",
    r"ZeroTensors are immutable": "of every write",
    r"DefaultCPUAllocator: (can't allocate|not enough) memory": "libraries look for these words",
    r"Storage size calculation overflowed|integer multiplication overflow": "too large to be",
}


def check_outcome(name, function, call, mode, replaced, *, fits):
    tensors = map(inner, (*replaced, *call.values()))
    memory = {t.untyped_storage()._cdata: t for t in tensors if is_dense(t)}.values()
    before = [(t, bytes_of(t), None if t.is_inference() else t._version) for t in memory]
    meanings = {n: meaning(x) for n, x in call.items()}
    hollow = [is_hollow(x) for n, x in call.items()
              if isinstance(x, torch.Tensor) and "Tensor" in str(kind_of(name, n))]  # fmt: skip
    try:
        with mode():
            result = call_function(function, call) if function else call_operator(name, call)
    except Exception as error:
        check_error(error, function, before, fits=fits, hollow=bool(hollow) and all(hollow))
        return
    if any(hollow):
        assert all(hollow), "tensors without data were taken beside real ones"
    elif not is_huge(call):
        check_numbers(name, function, call, meanings, result)
    for t, then, _ in before:
        assert torch.equal(bytes_of(t), then), "a byte beside what is to be written"


def check_error(error, function, before, *, fits, hollow):
    said = f"{type(error).__name__}: {str(error)[:1000]}"
    assert not fits, f"refused: {said}"
    # If no tensor has data, the operator checks the shapes when it runs.
    assert hollow or is_documented(error, function), said
    for t, then, version in before:
        assert torch.equal(bytes_of(t), then), f"written, then refused: {said}"
        assert version is None or t._version == version, f"counted, then refused: {said}"


def is_documented(error, function):
    text = str(error)
    if any(re.search(words, text) for words in WORDS_OF_PYTORCH):
        return True
    if not isinstance(error, RuntimeError | ValueError | TypeError):
        return False
    if "INTERNAL ASSERT" in text or "API call failed" in text:
        return False
    if not function and "Not yet supported ScalarType" in text:
        return True  # libtorch can't pass such a dtype to an operator of the stable ABI
    if function:
        return re.search(r"^rope(_ext\.|::)\w+(\.out)?: expected .+, got ", text, re.S) is not None
    return re.search(r"rope(::|\.)\w+", text) is not None


def check_numbers(name, function, call, meanings, result):
    """Checks the results, or the written tensors, whose old values are then restored."""
    after = {n: without_autograd(x) for n, x in call.items()}
    meanings = {n: as_number(kind_of(name, n), x) for n, x in meanings.items()}
    if meanings.get("dtype") in OF_NUMBERS:
        meanings["dtype"] = OF_NUMBERS[meanings["dtype"]]
    results = () if result is None else (result,) if isinstance(result, torch.Tensor) else result
    results = [plain(x) for x in results]
    if function:
        name = operator_of(function, meanings)
        if "rotary" in function:
            layout = {"layout": meanings.get("layout", "bshd")}
            results = [in_layout({**layout, "x": x})["x"] for x in results]
        meanings, after = of_operator(meanings), of_operator(after)
    expected = expected_results(name, meanings)
    wild = name not in EXACT_FOR_ANY_NUMBER and any(map(is_wild, meanings.values()))
    for want, got in zip(expected, results, strict=not RECORDS[name].written):
        if want.allowed is None or not wild:
            want.check(got, "result")
    for argument, want in zip(RECORDS[name].written, expected, strict=False):
        if want.allowed is None or not wild:
            want.check(plain(after[argument]), argument)
        if not after[argument]._is_zerotensor():  # immutable, so it had nothing to write
            with torch.inference_mode():
                after[argument].copy_(meanings[argument])


# ---- the meaning of arguments


@functools.cache
def kind_of(name, argument):
    """The type in the schema; None for words of the functions."""
    if argument in OF_FUNCTIONS:
        return OF_FUNCTIONS[argument]
    return next(str(a.type) for a in RECORDS[name].arguments if a.name == argument)


def as_number(kind, x):
    """The number that PyTorch makes of x: of a bool, a 0-d tensor, a numpy number."""
    if kind == "bool":
        return bool(x)
    if x is None or kind is None or "Tensor" in kind or isinstance(x, torch.dtype):
        return x
    return next(to for to in (bool, float, int) if to.__name__ in kind)(x)


def inner(x):
    return x.inner if isinstance(x, Wrapper) else x


def without_autograd(x):
    """The same memory, as an ordinary tensor."""
    x = inner(x)
    if not isinstance(x, torch.Tensor):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.data.as_subclass(torch.Tensor)


def plain(x):
    """The numbers that x represents."""
    return without_autograd(x).resolve_conj().resolve_neg()


def meaning(x):
    """A copy of an argument before the call; itself if it has no data or is too large."""
    x = inner(x)
    if isinstance(x, torch.Tensor) and x._is_zerotensor() and x.numel() <= MANY:
        return torch.zeros(x.shape, dtype=x.dtype)
    if is_dense(x) and x.numel() <= MANY:
        with contextlib.suppress(NotImplementedError):  # there is no copy of an int5
            return plain(x).clone(memory_format=torch.contiguous_format)
    return x


def is_hollow(x):
    return isinstance(x, FakeTensor) or (isinstance(x, torch.Tensor) and x.is_meta)


def is_huge(call):
    tensors = [x for x in call.values() if isinstance(x, torch.Tensor) and not x.is_nested]
    return any(max(x.shape, default=0) > MANY for x in tensors)


def is_wild(x):
    """Whether float32 may overflow or underflow between this number and an ordinary result."""
    if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize > 1:
        size = x.double().abs()
        return not bool(((size == 0) | ((size > 1e-9) & (size < 1e9))).all())
    return isinstance(x, float) and x != 0 and not 1e-9 < abs(x) < 1e9


# ---- memory


def bytes_of(t):
    """All bytes of the memory of t."""
    with torch.inference_mode():
        return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def dispatch_state():
    """The thread's state of PyTorch's dispatcher."""
    keys = torch._C._dispatch_tls_local_exclude_set(), torch._C._dispatch_tls_local_include_set()
    return *(k.raw_repr() for k in keys), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
