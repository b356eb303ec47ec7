"""Invalid arguments of every operator and of the functions that call it give either an error that
names the operator, before any byte is written, or the right numbers.
"""

import contextlib
import warnings

import invalid_arguments
import numbered_cases
import torch
from allowed_outcomes import check_outcome, dispatch_state, is_dense, is_huge, kind_of
from calls import CALLS, described, registered
from functions import ENTRIES, FUNCTIONS, arguments_of
from random_arguments import Draw
from torch._subclasses import FakeTensor

import rope_ext

CALLED = [*((name, None) for name in CALLS), *ENTRIES]
MODES = (torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode)
# PyTorch can't make such a tensor.
NOT_MADE = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)


def test_every_operator_and_function_has_a_case():
    assert registered() == set(CALLS)
    functions = {n for n in rope_ext.__all__ if type(getattr(rope_ext, n)) is type(run_case)}
    assert functions == {function for _, function in ENTRIES}
    assert all(name.endswith("_backward") for name in set(CALLS) - set(FUNCTIONS))


def test_an_error_before_any_write_or_the_right_numbers():
    numbered_cases.run_in_a_process(__file__, 3000)


def run_case(number, note):
    d = Draw(f"arguments {number}")
    name, function = CALLED[number % len(CALLED)]
    call = CALLS[name](d)
    if function:
        call = arguments_of(d, name, function, call)
    said, replaced = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(d.choice((0, 1, 1, 1, 1, 1, 2, 2, 3))):
            replaced += call.values()
            said += changed(d, name, function, call)
    tensors = [x for x in call.values() if isinstance(x, torch.Tensor)]
    if any(isinstance(x, FakeTensor) for x in tensors) and (
        is_huge(call) or any(x.dtype in invalid_arguments.NOT_PRINTED for x in tensors)
    ):
        return  # PyTorch prints refused mixtures; if that fails, it leaves guards behind
    mode = d.choice(MODES)
    by = f"rope_ext.{function}" if function else name
    note(f"{by}, {' and '.join(said) or 'as it is'}; {mode.__name__}, {described(call)}")
    try:
        check_outcome(name, function, call, mode, replaced, fits=not said)
    finally:
        assert dispatch_state() == DISPATCHING, "the dispatcher is left in another state"


def changed(d, name, function, call):
    """Changes an argument, or lets two share memory, and describes the change."""
    tensors = [n for n, x in call.items() if is_dense(x) and "Tensor" in str(kind_of(name, n))]
    if tensors and d.chance(0.05):
        way = d.choice((invalid_arguments.FAKES.from_tensor, lambda t: t.to("meta")))
        call |= {n: way(call[n]) for n in tensors}
        return ["all without data"]
    if len(tensors) > 1 and d.chance(0.1):
        with contextlib.suppress(*NOT_MADE):
            return share_memory(d, call, *d.sample(tensors, 2))
        return []
    argument = d.choice(list(call))
    way, new = replacement(d, kind_of(name, argument), argument, call[argument])
    if new is call[argument] or (
        # PyTorch takes any number for a dtype, and reads past the end of a list.
        argument == "dtype"
        and not function
        and type(new) is int
        and new not in invalid_arguments.OF_NUMBERS
    ):
        return []
    call[argument] = new
    return [f"{argument} by {way}"]


def replacement(d, kind, argument, old):
    """The replacement of an argument of this kind in the schema, and its name."""
    if kind is None:
        way = invalid_arguments.text
    elif argument == "dtype":
        way = invalid_arguments.dtype_argument
    elif "Tensor" not in kind:
        ways = {"bool": invalid_arguments.boolean, "float": invalid_arguments.floating}
        way = next((way for of, way in ways.items() if of in kind), invalid_arguments.integer)
    else:
        way = d.choice(invalid_arguments.OF_TENSORS)
    if way not in invalid_arguments.OF_TENSORS:
        return way.__name__, way(d, old)
    fitting = old if is_dense(old) else d.indices(3, below=2, dtype=torch.int64)
    new = None
    with contextlib.suppress(*NOT_MADE):
        new = way(d, fitting)
    return way.__name__, old if new is None and way is not invalid_arguments.no_tensor else new


def share_memory(d, call, first, second):
    """Puts two arguments into one buffer, overlapping or side by side."""
    a, b = call[first], call[second]
    if a.shape == b.shape and a.dtype == b.dtype and d.chance(0.3):
        call[second] = a
        return [f"{second} is {first}"]
    sizes = [t.numel() * t.element_size() for t in (a, b)]
    if max(sizes) > 2**20:
        return []
    apart = d.randint(-(sizes[1] // 8) - 1, sizes[0] // 8 + 1) * 8
    places = max(0, -apart), max(0, apart)
    buffer = torch.zeros(sum(sizes) + 32, dtype=torch.uint8)
    for argument, t, place, size in d.sample(
        [(first, a, places[0], sizes[0]), (second, b, places[1], sizes[1])], 2
    ):
        call[argument] = buffer[place : place + size].view(t.dtype).view(t.shape)
        call[argument].copy_(t)
    return [f"{first} and {second} in one buffer"]


DISPATCHING = dispatch_state()

if __name__ == "__main__":
    numbered_cases.main(__file__, run_case)
