"""Tensors without plain memory as each argument of every operator: they are read right, or an error
names the operator (a function also the argument) before anything is written.
"""

import re

import pytest
import torch
from operator_arguments import arguments_of, function_of, results_of
from support import assert_same_bits, random, random_table
from torch.autograd import forward_ad

import rope_ext
from rope_ext._operators import OPERATORS

rope = torch.ops.rope

B, S, H, D, P = 2, 3, 2, 16, 8
NOT_IN_MEMORY = {  # and a plain tensor of the same values
    "negated": (lambda x: torch._neg_view(x if x.element_size() == 1 else -x), lambda x: x),
    "zeros": (lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype), torch.zeros_like),
}
OF_OTHER_KINDS = {
    "complex": lambda x: torch.complex(x, x).conj(),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.view(-1, x.shape[-1]).to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "mkldnn": lambda x: x.to_mkldnn(),
}


CALLS = {operator.op: (operator, operator.overload) for operator in OPERATORS}
CALLS |= {f"rope_ext.{o.name}": (o, f) for o in OPERATORS if (f := function_of(o)) is not None}


def places(make):
    """Each call with each of its tensors replaced: name, operator, function, place, arguments."""
    for name, (operator, function) in CALLS.items():
        for place, x in arguments_of(operator).items():
            given = arguments_of(operator)
            try:
                given[place] = make(given[place])
            except Exception:  # this kind does not exist for the dtype or rank
                continue
            if isinstance(x, torch.Tensor):
                yield name, operator, function, place, given


def refusal(function, given, place):
    """The message. All other tensors are compared with their old values."""
    tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor) and n != place}
    kept = {n: x.clone() for n, x in tensors.items()}
    with pytest.raises((RuntimeError, ValueError)) as refused:
        function(**given)
    for n, x in tensors.items():
        assert_same_bits(x, kept[n])
    return str(refused.value)


def assert_names(message, name, operator, place):
    """The message names the operator or function; that of a function also the argument."""
    base = re.split(r"_?(\.out)?$", operator.name)[0]
    assert re.search(rf"rope(::|\.|_ext\.){base}", message), f"{name}, {place}: {message}"
    if name.startswith("rope_ext"):
        argument = r"out[_[]" if place.startswith("out_") else place  # out_q, or out[0]
        assert re.search(argument, message), f"{name}, {place}: {message}"


# ---- the tests


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("values", NOT_IN_MEMORY)
def test_values_that_are_not_in_memory_are_read_right_and_not_written(values, mode):
    read = set()
    make, plain = NOT_IN_MEMORY[values]
    for name, operator, function, place, given in places(make):
        with mode():
            if place in operator.written:
                memory = torch._neg_view(given[place]) if values == "negated" else torch.zeros(())
                before = memory.clone()
                message = refusal(function, given, place)
                assert_names(message, name, operator, place)
                assert "which is written" in message
                assert_same_bits(memory, before)
                continue
            expected = arguments_of(operator)
            expected[place] = plain(expected[place])
            try:
                expected = results_of(function, expected, operator.written)
            except RuntimeError:  # for scales and slots of zero
                assert_names(refusal(function, given, place), name, operator, place)
                continue
            for a, b in zip(results_of(function, given, operator.written), expected, strict=True):
                assert_same_bits(a, b)
        read.add((operator, place))
    assert {operator for operator, _ in read} == {*OPERATORS}
    assert {place for _, place in read} >= {"cos", "position_ids", "axes", "q_weight", "kv_c"}


@pytest.mark.filterwarnings("ignore")  # warnings about new or old kinds
@pytest.mark.parametrize("kind", OF_OTHER_KINDS)
def test_tensor_of_another_kind_is_refused_and_nothing_written(kind):
    refused = set()
    for name, operator, function, place, given in places(OF_OTHER_KINDS[kind]):
        assert_names(refusal(function, given, place), name, operator, place)
        refused.add(operator)
    assert {o.name for o in {*OPERATORS} - refused} <= {
        "cos_sin_cache"
    }  # jagged has two dimensions


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # used by forward_ad
def test_tensors_whose_gradient_or_tangent_would_be_lost_are_refused():
    """Either the result has a gradient, or an error is raised: also for a scale."""

    def with_grad(x):
        return x.requires_grad_()

    def with_tangent(x):
        if not x.is_floating_point():
            raise TypeError
        return forward_ad.make_dual(x, torch.zeros_like(x))

    refused = set()
    with forward_ad.dual_level():
        for make, has in (
            (with_grad, lambda x: x.requires_grad),
            (with_tangent, lambda x: forward_ad.unpack_dual(x).tangent is not None),
        ):
            for name, operator, function, place, given in places(make):
                kept = {n: x.clone() for n, x in given.items() if n in operator.written}
                try:
                    results = results_of(function, given, operator.written)
                except RuntimeError as error:
                    assert re.search(r"requires? grad|without tangents", str(error))  # noqa: PT017
                    for n, x in kept.items():
                        assert torch.equal(given[n].float(), x.float()), (
                            f"{name}, {place}: {n} written"
                        )
                    refused.add((operator.name, place, make))
                else:
                    assert any(has(x) for x in results), f"{name}, {place}"
    for place in ("k_scale", "v_scale"):
        assert ("apply_rotary_qk_append_kv_", place, with_grad) in refused
        assert ("apply_rotary_qk_append_kv_", place, with_tangent) in refused


def rotated_in_place(*arguments):
    return rope_ext.apply_rotary_qk(*arguments, inplace=True)


@pytest.mark.parametrize("rotate", [rope.apply_rotary_qk_, rotated_in_place])
def test_negated_view_is_rotated_in_place_by_vmap_and_refused_in_a_graph(rotate):
    z = random(B, 1, S, H, D).to(torch.complex64) * 1j
    q, k, (cos, sin) = z.conj().imag, random(B, 1, S, H, D), random_table(S, P)
    assert q.is_neg()
    expected = [x.unsqueeze(1) for x in rope.apply_rotary_qk(q[:, 0], k[:, 0], cos, sin)]
    kept = k.clone()
    graph = torch.compile(lambda q, k: rotate(q, k, cos, sin), backend="eager")
    with pytest.raises(RuntimeError, match="expected q, which is written, to be no view that neg"):
        graph(q[:, 0], k[:, 0])
    assert_same_bits(k, kept)
    torch.vmap(lambda q, k: (rotate(q, k, cos, sin), q)[1])(q, k)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])
