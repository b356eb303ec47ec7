"""Calls past the dispatcher (csrc/host/direct.cpp): the same results, versions and errors."""

import inspect
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from operator_arguments import arguments_of
from support import assert_same_bits, naming, random, random_table
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import rope_ext
from rope_ext import _C, _destinations, angles, kv_cache, qkv, quantize
from rope_ext._operators import OPERATORS
from rope_ext.module import rotary_embedding

BY_NAME = {operator.name: operator for operator in OPERATORS}
# function -> its operators: with new results, in place
FUNCTIONS = {
    rope_ext.apply_rotary: ("apply_rotary", "apply_rotary_"),
    rope_ext.apply_rotary_qk: ("apply_rotary_qk", "apply_rotary_qk_"),
    rope_ext.apply_rotary_qk_at: ("apply_rotary_qk_at", "apply_rotary_qk_at_"),
    rope_ext.apply_rotary_qkv: ("apply_rotary_qkv", None),
    rope_ext.rms_norm_rotary_qkv: ("rms_norm_rotary_qkv", None),
    rope_ext.rms_norm_rotary: ("rms_norm_rotary", "rms_norm_rotary_"),
    rope_ext.rms_norm_rotary_qk: ("rms_norm_rotary_qk", "rms_norm_rotary_qk_"),
    rope_ext.cos_sin: ("cos_sin", None),
    rope_ext.cos_sin_cache: ("cos_sin_cache", None),
    rope_ext.apply_rotary_qk_append_kv_: (None, "apply_rotary_qk_append_kv_"),
    rope_ext.rms_norm_rotary_qk_append_kv_: (None, "rms_norm_rotary_qk_append_kv_"),
    rope_ext.apply_rotary_mla_append_: (None, "apply_rotary_mla_append_"),
    rope_ext.apply_rotary_quantize: (None, "apply_rotary_quantize"),
    rope_ext.shift_cached_k_: (None, "shift_cached_k_"),
}
WAYS = [
    pytest.param(function, BY_NAME[name], id=name)
    for function, names in FUNCTIONS.items()
    for name in filter(None, names)
]
SWAPPED = {"bshd": None, "bhsd": (1, 2), "sbhd": (0, 1), "HND": (1, 2)}
NOT_DEFAULT = {"start": 7, "interleaved_out": False, "dtype": torch.float64}
IN_LAYOUT = "x", "q", "k", "v", "q_out", "x_out", "scale_out"
CACHES = "k_cache", "v_cache"

every_way = pytest.mark.parametrize(("function", "operator"), WAYS)


@pytest.fixture
def only_direct(monkeypatch):
    """Fails where a function calls an operator by the dispatcher."""

    def call(operator, *args):
        raise AssertionError(f"{operator} was called by the dispatcher")

    for module in (_destinations, angles, kv_cache, qkv, quantize):
        monkeypatch.setattr(module, "call", call)


@pytest.fixture
def by_dispatcher():
    """Runs a function with direct calls off."""

    def run(function, *args, **options):
        before = _C.use_direct_calls(False)
        try:
            return function(*args, **options)
        finally:
            _C.use_direct_calls(before)

    return run


def arguments_for(function, operator, **variant):
    """Those of the operator, for the function."""
    given = arguments_of(operator, **variant)
    if variant.get("optional", True):
        names = {argument.name for argument in operator.arguments}
        given |= {name: value for name, value in NOT_DEFAULT.items() if name in names}
    parameters = inspect.signature(function).parameters
    if "inplace" in parameters and operator.written:
        given["inplace"] = True
        given.pop("interleaved_out", None)
    return {name: value for name, value in given.items() if name in parameters}


def copied(given):
    """The arguments with tensors of the same strides and memory of their own."""

    def copy(x):
        return x.clone() if x.is_contiguous() else torch.empty_like(x).copy_(x)

    return {name: copy(x) if isinstance(x, Tensor) else x for name, x in given.items()}


def outcome(function, given):
    """Results, or the error; then the bits, strides and versions of all tensors of the call."""
    try:
        with _disable_current_modes():  # those of the plugins that run the tests
            returned = function(**given)
    except Exception as error:
        returned = f"{type(error).__name__}: {error}"
    results = returned if isinstance(returned, tuple) else (returned,)
    return [*results, *given.values()], [x._version for x in given.values() if is_tensor(x)]


def is_tensor(x):
    return isinstance(x, Tensor)


def assert_same(got, expected):
    assert got[1] == expected[1]
    for a, b in zip(got[0], expected[0], strict=True):
        if is_tensor(a) and is_tensor(b):
            assert (a.stride(), a.requires_grad) == (b.stride(), b.requires_grad)
            assert_same_bits(a, b)
        else:
            assert type(a) is type(b)
            assert a == b


def rotation(dtype=torch.float32):
    q, k = random(1, 3, 4, 8, dtype=dtype), random(1, 3, 2, 8, dtype=dtype)
    return {"q": q, "k": k, **dict(zip(("cos", "sin"), random_table(3, 4), strict=True))}


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@every_way
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optional", [True, False], ids=["all", "fewest"])
def test_results_and_versions_are_those_of_the_dispatcher(
    function, operator, mode, optional, only_direct, monkeypatch, by_dispatcher, device
):
    """Those of the operator, and of the function where direct calls are off."""
    given = arguments_for(function, operator, optional=optional)
    given = {n: x.to(device) if is_tensor(x) else x for n, x in given.items()}
    given, expected, same = (copied(given) for _ in range(3))
    options = {n: x for n, x in expected.items() if n != "inplace"}
    with MODES[mode]():
        got = outcome(function, given)
        of_operator = operator.overload(**options)
        monkeypatch.undo()
        assert_same(got, by_dispatcher(outcome, function, same))
    for name in given.keys() & {*operator.written}:
        assert_same_bits(given[name], expected[name])
        assert given[name]._version == expected[name]._version == 1
    if not operator.written:
        results = of_operator if isinstance(of_operator, tuple) else (of_operator,)
        assert_same((got[0][: len(results)], []), (results, []))
        assert all(x.is_inference() == (mode == "inference") for x in got[0][: len(results)])
        assert mode == "inference" or all(x._version == 0 for x in got[0][: len(results)])


def has_layouts(function):
    """Packed projections are direct in bshd and thd alone."""
    parameters = inspect.signature(function).parameters
    return "layout" in parameters and "qkv" not in parameters


@pytest.mark.parametrize(
    ("function", "operator"), [way for way in WAYS if has_layouts(way.values[0])]
)
@pytest.mark.parametrize("layout", ["bhsd", "sbhd"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "of a wider tensor"])
def test_every_layout_is_direct(
    function, operator, layout, dense, only_direct, monkeypatch, by_dispatcher
):
    given = arguments_for(function, operator)
    for name in given.keys() & {*IN_LAYOUT}:
        given[name] = given[name].transpose(*SWAPPED[layout]).contiguous()
    given["layout"] = layout
    if "cache_layout" in inspect.signature(function).parameters:
        given["cache_layout"] = "HND"
        for name in CACHES:
            given[name] = given[name].transpose(*SWAPPED["HND"]).contiguous()

    def arguments():
        made = copied(given)
        if not dense:
            made |= {
                n: torch.cat((x, x), -1)[..., : x.shape[-1]]
                for n, x in made.items()
                if n in IN_LAYOUT
            }
        return made

    got = outcome(function, arguments())
    monkeypatch.undo()
    assert_same(got, by_dispatcher(outcome, function, arguments()))
    assert not isinstance(got[0][0], str)


def wrong_values(name, value):
    """Values that the operators refuse for one that they take, or that go to the dispatcher."""
    if is_tensor(value):
        yield value.to(torch.complex64)
        yield value.bool()
        yield value[None, None]
        yield value.flatten()[:1]
        if value.dim() > 0:
            yield value[..., :0]
            yield torch.stack((value, value), -1)[..., 0]  # last stride 2
            yield value[:1].expand(value.shape)
        yield value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
        yield value.to("meta")
        if not value.is_floating_point():
            yield value + 1000
            yield value - 1000
        if value.dtype == torch.float32:
            yield value - 1000
        yield value.tolist()
    elif isinstance(value, bool):
        yield from (1, "yes", None)
    elif isinstance(value, int):
        yield from (-1, 2**63, 2**70, 0.5)
    elif isinstance(value, float):
        yield from (1, float("nan"), -1.0, "1")
    yield from ((None, "thing", object()) if name != "x" else (None,))


@every_way
def test_every_refusal_is_that_of_the_dispatcher_and_nothing_is_written(
    function, operator, by_dispatcher
):
    good = {**arguments_for(function, operator), "rotary_dim": 4}
    parameters = inspect.signature(function).parameters
    good = {n: x for n, x in good.items() if n in parameters}
    defaults = {
        n: p.default for n, p in parameters.items() if p.default is not p.empty and n not in good
    }
    cases = [(n, bad) for n, x in (good | defaults).items() for bad in wrong_values(n, x)]
    # Tensors that share memory with one that is written.
    cases += [(n, x) for n in operator.written for x in good.values() if is_tensor(x)]
    refusals = set()
    for name, bad in cases:

        def call(name=name, bad=bad):
            given = copied(good)
            shared = next((n for n, x in good.items() if x is bad), None)
            given[name] = bad if shared is None else given[shared]
            before = {
                n: (x.clone(), x._version)
                for n, x in given.items()
                if n in operator.written and is_tensor(x)
            }
            returned = outcome(function, given)[0][0]
            if isinstance(returned, str):
                for n, (bits, version) in before.items():
                    assert given[n].is_meta or torch.equal(given[n], bits), (n, returned)
                    assert given[n]._version == version, (n, returned)
            return returned

        got, expected = call(), by_dispatcher(call)
        if isinstance(got, str) or isinstance(expected, str):
            assert got == expected, (name, bad)
            refusals.add(got)
    assert len(refusals) > len(good)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_out_is_direct_and_written_alike_by_the_dispatcher(
    layout, only_direct, monkeypatch, by_dispatcher
):
    given = rotation()
    q, k = given.pop("q"), given.pop("k")
    expected = [rope_ext.reference.apply_rotary(x, **given) for x in (q, k, q)]
    heads_first = layout == "bhsd"
    q, k = (x.transpose(1, 2) if heads_first else x for x in (q, k))

    def call():
        out, one = (torch.empty_like(q), torch.empty_like(k)), torch.empty_like(q)
        assert rope_ext.apply_rotary_qk(q, k, **given, layout=layout, out=out) is out
        assert rope_ext.apply_rotary(q, **given, layout=layout, out=one) is one
        for got, x in zip((*out, one), expected, strict=True):
            assert got._version == 1
            assert_same_bits(got.transpose(1, 2) if heads_first else got, x)
        weight = random(8)
        normed = rope_ext.rms_norm_rotary_qk(q, k, weight, weight, **given, layout=layout)
        assert rope_ext.rms_norm_rotary(q, weight, **given, layout=layout, out=one) is one
        rope_ext.rms_norm_rotary_qk(q, k, weight, weight, **given, layout=layout, out=out)
        for got, x in zip((one, *out), (normed[0], *normed), strict=True):
            assert_same_bits(got, x)

    call()
    monkeypatch.undo()
    by_dispatcher(call)


MODULES = {
    "default": {},
    "learned": {"learned": True},
    "interleaved": {"interleaved": True, "rotary_dim": 4},
    "yarn": {
        "scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    },
}


@pytest.mark.parametrize("positions", [False, True], ids=["", "positions"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize(
    ("options", "layout"), [*zip(MODULES, ["bshd", "bhsd", "sbhd", "thd"], strict=True)]
)
def test_module_is_direct(options, layout, inplace, positions, monkeypatch, by_dispatcher, device):
    module = rope_ext.RotaryEmbedding(8, **MODULES[options], device=device)
    module.table(8)
    shape = {"bshd": (2, 3), "bhsd": (2, 4, 3), "sbhd": (3, 2), "thd": (3,)}[layout]
    rest = (8,) if layout == "bhsd" else (4, 8)
    ids = torch.tensor([5, 2, 7], device=device) if positions else None

    def call():
        q, k = (random(*shape, *rest, seed=seed, device=device) for seed in (0, 1))
        with torch.no_grad(), _disable_current_modes():
            return (*module(q, k, ids, layout=layout, inplace=inplace), q, k)

    expected = by_dispatcher(call)
    with monkeypatch.context() as patched:
        if not (options == "learned" and not positions):  # its table is made anew in each call
            patched.setattr(rotary_embedding, "apply_rotary_qk", None)
        assert_same((call(), []), (expected, []))


def test_module_keeps_no_table_where_its_frequencies_need_a_gradient_or_have_changed():
    module, q = rope_ext.RotaryEmbedding(8), random(1, 3, 2, 8)
    first, _ = module(q, q)
    module.inv_freq.mul_(2)
    assert not torch.equal(module(q, q)[0], first)
    module.inv_freq.requires_grad_()
    assert module(q, q)[0].requires_grad


LONG_ROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


def test_module_with_a_table_does_what_it_does_without_direct_calls(by_dispatcher):
    default, yarn = ({}, MODULES["yarn"])
    long_rope = {"max_position_embeddings": 16, "scaling": LONG_ROPE}
    ids, pixels = torch.tensor([5, 2, 7, 1, 0, 3]), torch.tensor([0.5, 2, 7, 1, 0, 3])
    double = ("inv_freq", lambda module: module.inv_freq.double())
    cases = (  # options of the module, an attribute to set, x, the arguments
        (default, (), random(1, 6, 2, 16), ()),  # of another head_dim
        (default, (), random(1, 6, 2, 16), (ids,)),
        (default, (), random(6, 8), ()),
        (default, (), random(1, 6, 2, 8).double(), (ids,)),  # rows are of float32
        (default, double, random(1, 6, 2, 8), (ids,)),
        (yarn, (), random(1, 6, 2, 8), (pixels,)),
        (yarn, (), random(1, 60, 2, 8), ()),  # longer than the table
        (long_rope, (), random(1, 6, 2, 8), ()),  # the table is of shorter sequences
        (long_rope, (), random(1, 6, 2, 8), (ids,)),
    )
    for options, attribute, x, arguments in cases:

        def call(options=options, attribute=attribute, x=x, arguments=arguments):
            module = rope_ext.RotaryEmbedding(x.shape[-1] if x.dim() < 3 else 8, **options)
            module.table(3)
            if attribute:
                setattr(module, attribute[0], attribute[1](module))
            given = {"q": x.clone(), "k": x.clone()}
            given |= dict(zip(("position_ids",), arguments, strict=False))
            return outcome(module, given)

        with naming(f"{options}, {x.shape}, {arguments}"):
            assert_same(call(), by_dispatcher(call))


# ---- where the dispatcher is needed


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_a_mode_sees_the_operator(mode, inplace):
    with mode() as active:
        rope_ext.apply_rotary_qk(**rotation(), inplace=inplace)
    assert any("rope" in name for name in active.seen)


def test_a_profile_has_the_operator():
    with torch.profiler.profile() as profile, torch.no_grad():
        rope_ext.apply_rotary_qk(**rotation())
    assert "rope::apply_rotary_qk" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:.*is deprecated.*")
def test_a_trace_has_the_operator():
    given = rotation()

    def rotate(q):
        return rope_ext.apply_rotary(q, given["cos"], given["sin"])

    assert "rope::apply_rotary" in str(torch.jit.trace(rotate, given["q"]).graph)


@pytest.mark.parametrize("name", ["q", "cos"])
@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
def test_a_gradient_is_recorded(name, kind):
    given = rotation()
    given[name] = given[name].requires_grad_() if kind is Tensor else nn.Parameter(given[name])
    assert rope_ext.apply_rotary_qk(**given)[0].grad_fn is not None
    with torch.no_grad():
        assert rope_ext.apply_rotary_qk(**given)[0].grad_fn is None


def test_transforms_and_tangents_are_kept():
    given = rotation()
    q, cos, sin = given["q"], given["cos"], given["sin"]
    expected = rope_ext.apply_rotary(q, cos, sin)
    batched = vmap(lambda x: rope_ext.apply_rotary(x, cos, sin))(torch.stack((q, q)))
    assert_same_bits(batched, torch.stack((expected, expected)))
    with torch.no_grad(), forward_ad.dual_level():
        dual = rope_ext.apply_rotary(forward_ad.make_dual(q, q), cos, sin)
        assert_same_bits(forward_ad.unpack_dual(dual).tangent, expected)


class Subclass(Tensor):
    pass


def test_a_subclass_keeps_its_type():
    given = rotation()
    rotated = rope_ext.apply_rotary(given["q"].as_subclass(Subclass), given["cos"], given["sin"])
    assert type(rotated) is Subclass


@pytest.mark.parametrize("name", ["q", "cos"])
def test_values_that_are_not_in_memory_count(name):
    given = rotation()
    others = {
        torch._neg_view(-given[name]): given[name],
        torch._efficientzerotensor(given[name].shape): torch.zeros_like(given[name]),
    }
    for other, plain in others.items():
        got, expected = (
            rope_ext.apply_rotary(t["q"], t["cos"], t["sin"])
            for t in ({**given, name: other}, {**given, name: plain})
        )
        assert_same_bits(got, expected)


def test_inference_tensors_are_written_in_inference_mode_alone():
    given = rotation()
    with torch.inference_mode():
        given["k"] = given["k"].clone()
        rope_ext.apply_rotary_qk(**given, inplace=True)
    assert given["q"]._version == 1
    bits = given["q"].clone(), given["k"].clone()
    message = r"^rope::apply_rotary_qk_: expected no inference tensor to be written outside of"
    with pytest.raises(RuntimeError, match=message):
        rope_ext.apply_rotary_qk(**given, inplace=True)
    assert_same_bits(given["q"], bits[0])
    assert_same_bits(given["k"], bits[1])
    assert given["q"]._version == 1


# ---- what surrounds them


def test_other_threads_run_during_a_long_call(only_direct):
    x, (cos, sin) = random(1, 8192, 16, 64), random_table(8192, 32)
    ticks, running = [], True

    def tick():
        while running:
            ticks.append(time.perf_counter())
            time.sleep(0)  # gives the interpreter back

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the other thread runs only where the interpreter is released
    thread.start()
    try:
        inside = 0
        for _ in range(5):
            ticks.clear()
            begin = time.perf_counter()
            rope_ext.apply_rotary(x, cos, sin, inplace=True)
            end = time.perf_counter()
            inside += sum(begin < at < end for at in ticks)
    finally:
        running = False
        sys.setswitchinterval(interval)
        thread.join()
    assert inside > 20


@pytest.mark.parametrize(
    ("value", "state"), [("", "on"), ("0", "off: ROPE_EXT_DIRECT=0")], ids=["on", "off"]
)
def test_an_environment_variable_turns_them_off_and_info_says_so(value, state):
    code = "from rope_ext.__main__ import main; from rope_ext import _C; main(['info'])\n"
    code += "print('was', _C.use_direct_calls(False))"
    environment = {**os.environ, "ROPE_EXT_DIRECT": value}
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = {tuple(line.split(maxsplit=2)) for line in told.stdout.splitlines()}
    assert ("direct", "calls", state) in lines
    assert ("was", str(state == "on")) in lines


@pytest.mark.cuda
def test_results_are_in_the_memory_that_pytorch_counts(only_direct):
    x, (cos, sin) = random(1, 3, 4, 8, device="cuda"), random_table(3, 4, device="cuda")
    before = torch.cuda.memory_allocated()
    if before == 0:
        pytest.skip("an allocator that does not count")
    with _disable_current_modes():
        rotated = rope_ext.apply_rotary(x, cos, sin)
    assert torch.cuda.memory_allocated() - before >= rotated.nbytes
