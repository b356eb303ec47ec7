"""Every operator through every mechanism besides its kernels (rope_ext/_engine).

Operators come from their records, arguments from their schemas: the record of a new operator covers
it. An argument with a new name also needs a value in operator_arguments.py.
"""

import ast
import inspect
import re
from itertools import product
from pathlib import Path

import operator_arguments
import pytest
import torch
from operator_arguments import Sizes, arguments_of
from ranks import RANKS, as_rank, on_every_rank, place
from support import assert_same_bits, naming
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import rope_ext
from rope_ext._engine.calls import call
from rope_ext._engine.sharding import BATCH, SEQUENCE, rotation_sharding
from rope_ext._operators import OPERATORS
from rope_ext.reference import split_qkv

PACKAGE = Path(rope_ext.__file__).parent
N = 3  # samples of vmap
SMALL = Sizes(B=1, S=2, H=1, K=1, D=4, L=3)  # for numerical differences
SHARDED = Sizes(B=4, S=4, H=4, K=4, D=8, L=5)
# Sums over parts on several ranks: n <= B S H = 64 terms of about 1, each rounded at most n times,
# or of up to AXES L = 10 if a position is a factor.
SUMS = {"rtol": 64 * 2**-52, "atol": 10 * 64**2 * 2**-52}


def of(operators):
    return pytest.mark.parametrize("operator", list(operators), ids=lambda operator: operator.name)


def is_append(operator):
    """Whether it writes to a tensor other than those that rotate."""
    return bool({*operator.written} - {*operator.rotates, *operator.outs})


WRITING = [o for o in OPERATORS if o.written]
IN_PLACE = [o for o in WRITING if not o.outs and not is_append(o)]
every = of(OPERATORS)


def variants_of(operator):
    """Kinds of arguments by name: options of arguments_of."""
    kinds = {"all": {}, "fewest": {"optional": False}}
    if "cos" in operator.tensors:
        kinds["rows"] = {"optional": False, "rows": True}
    if "cos" in operator.tensors and "row_offsets" not in operator.tensors:
        kinds["packed rows"] = {"optional": False, "rows": True, "packed": True}
    return kinds.items()


def test_defaults_are_those_of_the_function():
    compared = set()
    for operator in OPERATORS:
        name = operator.name.partition(".")[0]
        function = getattr(rope_ext, name, getattr(rope_ext, name.rstrip("_"), None))
        parameters = {} if function is None else inspect.signature(function).parameters
        for argument in operator.arguments:
            parameter = parameters.get(argument.name)
            if parameter and parameter.default is not parameter.empty:
                assert argument.default_value == parameter.default, (operator.name, argument.name)
                compared.add(argument.name)
    assert compared >= {"interleaved", "rotary_offset", "inverse", "eps", "attention_scaling"}


def results_of(operator, given):
    """The results of a call, then the tensors that it has written."""
    return operator_arguments.results_of(operator.overload, given, operator.written)


def tensors_in(given):
    return {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}


def cloned(given):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def with_grad(x):
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.requires_grad_() if floating else x


def by_call(operator):
    """The operator as the functions of rope_ext call it."""

    def function(**given):
        call(operator.overload, (), given, tuple(given[name] for name in operator.written))

    return function


def assert_nothing_written(operator, given, error, functions=None):
    """Each call raises the error, and no tensor or version changes."""
    kept = cloned(given)
    versions = {n: x._version for n, x in tensors_in(given).items() if not x.is_inference()}
    for function in functions or (operator.overload, by_call(operator)):
        with pytest.raises(RuntimeError, match=re.escape(f"{operator.op}{error}")):
            function(**given)
    for name, x in tensors_in(given).items():
        assert_same_bits(x, kept[name])
        assert x.is_inference() or x._version == versions[name], name


# ---- the rules of the code


def test_every_operator_has_a_record():
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rope::")}
    assert sorted(operator.op for operator in OPERATORS) == sorted(registered)


def code_of(folder):
    """File names -> identifiers, and strings that are not docstrings."""
    found = {}
    for path in (PACKAGE / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        strings = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings
        ]
        names = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        names += [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        imports = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        found[path.name] = (names, strings, imports)
    return found


def test_no_engine_names_an_operator():
    operators = {operator.name.partition(".")[0] for operator in OPERATORS}
    files = code_of("_engine")
    assert "vmap.py" in files
    for file, (names, strings, imports) in files.items():
        words = {word for text in strings for word in re.findall(r"\w+", text)}
        assert operators & {*names, *words} == set(), file
        assert not any("_operators" in module for module in imports), file


def test_no_operator_names_a_dispatch_key():
    keys = {*torch._C.DispatchKey.__members__} | {"ADInplaceOrView", "Negative", "ZeroTensor"}
    files = code_of("_operators")
    assert "rotation.py" in files
    for file, (names, strings, _) in files.items():
        assert keys & {*names, *strings} <= {"Undefined"}, file


PRIVATE = re.compile(
    r"\b(torch|forward_ad|DTensor|overload|x)(\.\w+)*\._[a-zA-Z]"
    r"|\b(from|import) torch[\w.]*(\._| import _)|\._schema\b|\._base\b|\._is_view\b"
)


def test_private_names_of_pytorch_are_in_one_file():
    found = {
        str(path.relative_to(PACKAGE)): match[0]
        for path in PACKAGE.rglob("*.py")
        if (match := PRIVATE.search(path.read_text()))
    }
    assert list(found) == ["_torch_private.py"], found


# ---- kernels, fakes


def test_kernel_for_every_device_and_kind_of_tensor():
    for key in ("CPU", "CUDA", "QuantizedCPU", "QuantizedCUDA", "Meta", "Negative", "ZeroTensor"):
        for op in (operator.op for operator in OPERATORS):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key), (op, key)


def transposed(x, first, second):
    """Of the same shape, with two dimensions swapped in memory."""
    return x.transpose(first, second).contiguous().transpose(first, second)


def windows(x):
    """Of the same shape: heads one element apart. torch.empty_like has no channels last here."""
    return x.flatten(-2).unfold(-1, x.shape[-1], 1)[..., : x.shape[-2], :]


VIEWS = {
    "dense": lambda x: x,
    "transposed": lambda x: transposed(x, *{3: (0, 1), 4: (1, 2)}.get(x.dim(), (0, 0))),
    "part of a row": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() > 1 else x,
    "windows": lambda x: windows(x) if x.dim() > 1 else x,
}
OVERLAPPING = ("expanded", "windows")


@every
def test_fake_is_like_the_real_one(operator):
    for (variant, options), view in product(variants_of(operator), VIEWS):
        given = arguments_of(operator, **options)
        for name, x in tensors_in(given).items():
            if x.is_floating_point() and not (view in OVERLAPPING and name in operator.written):
                given[name] = VIEWS[view](x)
        with naming((variant, view)):
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = {n: mode.from_tensor(x) for n, x in tensors_in(given).items()}
                faked = results_of(operator, given | fakes)
            for fake, real in zip(faked, results_of(operator, given), strict=True):
                for what in ("shape", "dtype", "device"):
                    assert getattr(fake, what) == getattr(real, what)
                assert fake.stride() == real.stride()


@of(o for o in OPERATORS if len(o.tensors) > 1)
def test_tensor_on_another_device_is_refused_by_name(operator):
    """PyTorch does not pass a tensor without data among real ones to the kernel."""
    given = arguments_of(operator)
    for name in tensors_in(given):
        elsewhere = next(n for n in operator.tensors if n != operator.leading)
        named = name if name != operator.leading else elsewhere
        error = f": expected {named} on the device of {operator.leading}, "

        def function(name=name, **given):
            operator.overload(**{**given, name: given[name].to("meta")})

        assert_nothing_written(operator, given, error, [function])


OPCHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
)  # fmt: skip


@every
@pytest.mark.filterwarnings("ignore")  # warnings of opcheck itself
def test_opcheck(operator):
    kinds = [*variants_of(operator)]
    for variant, options in (kinds[0], kinds[-1]):  # seconds each
        given = arguments_of(operator, **options, float8=False)
        if not operator.written:
            given = {n: with_grad(x) for n, x in given.items()}
        needs_float8 = any(x.itemsize == 1 for x in tensors_in(given).values())
        args = tuple(given.pop(name) for name in operator.positional if name in given)
        # the check of schemas compares what is written by allclose, which float8 does not have
        checks = OPCHECKS[needs_float8:]
        with naming(variant):
            torch.library.opcheck(operator.overload, args, given, test_utils=checks)


def test_rows_of_packed_tokens_may_have_a_batch_of_one(device):
    for operator in OPERATORS:
        if "packed rows" not in dict(variants_of(operator)) or operator.name.endswith("backward"):
            continue
        given = arguments_of(operator, optional=False, rows=True, packed=True)
        given = given | {name: x.to(device) for name, x in tensors_in(given).items()}
        without = cloned(given) | {name: given[name][0] for name in ("cos", "sin")}
        expected = results_of(operator, without)
        for a, b in zip(results_of(operator, given), expected, strict=True):
            with naming(operator.name):
                assert_same_bits(a.view_as(b), b)


# ---- writes


def test_versions_of_what_is_written_are_counted():
    for operator, mode in product(OPERATORS, (torch.enable_grad, torch.inference_mode)):
        for function in (operator.overload, by_call(operator)):
            given = arguments_of(operator)
            before = {n: x._version for n, x in tensors_in(given).items()}
            with mode():
                function(**given)
            after = {n: x._version for n, x in tensors_in(given).items()}
            assert after == {n: c + (n in operator.written) for n, c in before.items()}, operator


@of(WRITING)
def test_inference_tensor_is_not_written_outside_of_inference_mode(operator):
    for name in operator.written:
        given = arguments_of(operator)
        with torch.inference_mode():
            given[name] = given[name].clone()
        assert_nothing_written(operator, given, ": expected no inference tensor")
        with torch.inference_mode():
            operator.overload(**given)


@of(WRITING)
def test_tensor_that_is_differentiated_is_refused_and_nothing_written(operator):
    """One that requires grad, and one with a tangent."""
    for name, x in tensors_in(arguments_of(operator)).items():
        if not x.is_floating_point():
            continue
        given = arguments_of(operator)
        given[name].requires_grad_()
        assert_nothing_written(operator, given, f": expected {name} to need no gradient (")
        if name not in operator.written:
            with torch.no_grad():
                operator.overload(**given)
        if x.element_size() > 1:  # float8 has no tangents
            with forward_ad.dual_level():
                given = arguments_of(operator)
                given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
                error = ": expected tensors without tangents"
                assert_nothing_written(operator, given, error, [operator.overload])


# ---- derivatives


@of(o for o in OPERATORS if not o.written)
def test_derivatives(operator):
    """Of every result by every floating tensor, against differences in random directions: backward,
    forward, twice, and under vmap.
    """
    for variant, options in variants_of(operator):
        given = arguments_of(operator, SMALL, dtype=torch.float64, **options)
        given = {name: with_grad(x) for name, x in given.items()}
        leaves = {n: x for n, x in tensors_in(given).items() if x.requires_grad}
        results = results_of(operator, given)
        some = [i for i, x in enumerate(results) if x.requires_grad]  # others may be zeros
        assert leaves
        assert some

        def function(*values, given=given, names=tuple(leaves), some=tuple(some)):
            results = results_of(operator, given | dict(zip(names, values, strict=True)))
            return tuple(results[i] for i in some)

        inputs, checks = tuple(leaves.values()), {"fast_mode": True, "check_batched_grad": True}
        forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
        with naming(variant):
            assert torch.autograd.gradcheck(function, inputs, **forward, **checks)
            assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, **checks)


# ---- vmap


def assert_vmap_is_a_loop(operator, of_samples, batched):
    """The arguments with these names have a value for each sample."""
    shared = {n: x for n, x in of_samples[0].items() if n not in batched}
    stacked = [torch.stack([given[name] for given in of_samples]) for name in batched]

    def function(*tensors):
        return tuple(results_of(operator, shared | dict(zip(batched, tensors, strict=True))))

    got = vmap(function)(*stacked)
    for i, given in enumerate(of_samples):
        expected = results_of(operator, cloned({**given, **shared}))
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a[i], b)


@of(o for o in OPERATORS if not o.outs and not is_append(o))
def test_vmap_is_a_loop(operator):
    """All tensors batched, and each alone, together with the written ones."""
    for variant, options in variants_of(operator):
        of_samples = [arguments_of(operator, seed=seed, **options) for seed in range(N)]
        names = [*tensors_in(of_samples[0])]
        for some in (names, *([n for n in names if n in (name, *operator.written)]
                              for name in names)):  # fmt: skip
            with naming((variant, some)):
                assert_vmap_is_a_loop(operator, of_samples, some)


def test_vmap_that_would_write_one_tensor_for_all_samples_is_refused():
    """Of operators that rotate in place: unless what they write is batched. Others: always."""
    for operator in WRITING:
        error = ": expected what is written to be batched" if operator in IN_PLACE else ""
        for name in tensors_in(arguments_of(operator)):
            if operator in IN_PLACE and {name} == {*operator.written}:
                continue
            given = arguments_of(operator)

            def mapped(operator=operator, name=name, **given):
                x = given.pop(name)
                vmap(lambda x: operator.overload(**given, **{name: x}))(torch.stack([x, x]))

            assert_nothing_written(operator, given, error, [mapped])


# ---- FLOPs


def test_flops_are_those_of_the_channels():
    for operator, optional in product(OPERATORS, (True, False)):
        given = arguments_of(operator, optional=optional)
        with FlopCounterMode(display=False) as counter:
            operator.overload(**given)
        named, names = dict(given), operator.rotates
        if names == ("qkv",):
            names, parts = ("q", "k"), split_qkv(given["qkv"], given["kv_heads"])
            named |= dict(zip(names, parts, strict=False))
        if operator.name == "shift_cached_k_":  # the keys in its slots, which may be -1
            keys = (*given["slot_mapping"].shape, *given["k_cache"].shape[2:])
            names, named["k"] = ("k",), torch.empty(keys)
        xs = [named[n] for n in names if named.get(f"grad_{n}", named[n]) is not None]
        channels = sum(x.numel() for x in xs if x is not None)  # all of them rotate
        of_channel = operator.flops_rotated + operator.flops_channel
        assert counter.get_total_flops() == channels * of_channel, operator
        assert bool(names) == bool(counter.get_total_flops()), operator


# ---- DTensors


def sharding_of(operator, given):
    all_given = operator.given((), given)
    return (operator.sharding or rotation_sharding)(operator, all_given)


def placed(given, mesh, placements):
    """`given` as DTensors, replicated unless `placements` says otherwise."""
    return given | {
        n: place(x, mesh, *([placements[n]] if n in placements else []))
        for n, x in tensors_in(given).items()
    }


def assert_refused(expected, on_rank):
    with as_rank(1):
        mesh = init_device_mesh("cpu", (RANKS,))
        with pytest.raises(RuntimeError, match=expected):
            on_rank(mesh)


@of(o for o in OPERATORS if "row_offsets" not in o.tensors)  # they are of a rank's own tokens
def test_every_rank_computes_its_part(operator):
    for variant, options in variants_of(operator):
        with naming(variant):
            assert_every_rank_computes_its_part(
                operator, arguments_of(operator, SHARDED, dtype=torch.float64, **options)
            )


def assert_every_rank_computes_its_part(operator, given):
    """Axis by axis: all tensors with the axis are sharded along it."""
    sharding = sharding_of(operator, given)
    axes_of = {name: axes for name, axes in sharding.axes.items() if given.get(name) is not None}
    for axis in sorted({axis for axes in axes_of.values() for axis in axes if axis}):
        placements = {n: Shard(axes.index(axis)) for n, axes in axes_of.items() if axis in axes}

        def on_rank(mesh, placements=placements):
            return results_of(operator, placed(cloned(given), mesh, placements))

        if sharding.tokens_stay_whole and axis in (BATCH, SEQUENCE):
            refused = f"{operator.op}: expected tokens to be replicated"
            assert_refused(refused, on_rank)
            continue
        is_sum = any(axis in result.summed for result in sharding.results)
        got, expected = on_every_rank(on_rank), results_of(operator, cloned(given))
        for part, whole in zip(got, expected, strict=True):
            if is_sum:
                torch.testing.assert_close(part, whole, **SUMS)
            else:
                assert_same_bits(part, whole)


@every
def test_a_dimension_that_must_be_whole_is_not_sharded(operator):
    """A dimension without an axis, such as channels: every rank needs all of it."""
    given = arguments_of(operator, SHARDED)
    for name, axes in sharding_of(operator, given).axes.items():
        if given.get(name) is None:
            continue
        for dim in range(given[name].dim()):
            if dim < len(axes) and axes[dim] is not None:
                continue
            at = {name: Shard(dim)}
            assert_refused(
                rf"{operator.op}: expected {name} to be Replicate\(\), as it is needed whole",
                lambda mesh, at=at: results_of(operator, placed(given, mesh, at)),
            )


@every
def test_a_pending_sum_passes_through_what_is_linear(operator):
    """And through nothing else: a product of sums is not the sum of products."""
    sharding = sharding_of(operator, arguments_of(operator, SHARDED))
    for name in sharding.axes:
        given = arguments_of(operator, SHARDED)
        if given.get(name) is None or not given[name].is_floating_point():
            continue

        def on_rank(mesh, given=given, name=name):
            return results_of(operator, placed(cloned(given), mesh, {name: Partial()}))

        if name in sharding.linear and not operator.written and is_alone(sharding, name):
            scaled = given | {name: given[name] * RANKS}
            got, expected = on_every_rank(on_rank), results_of(operator, scaled)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
        elif not operator.written:
            assert_refused(f"{operator.op}: expected", on_rank)


def is_alone(sharding, name):
    """Whether each term of each existing result has the name, or none has."""
    terms = [result.terms for result in sharding.results]
    return all(
        all(name in term for term in of_result) or not any(name in t for t in of_result)
        for of_result in terms
    )


@of(o for o in OPERATORS if len(o.tensors) > 1)
def test_plain_tensors_beside_dtensors_are_refused(operator):
    given = arguments_of(operator, SHARDED)
    first, second, *_ = [n for n in operator.tensors if given.get(n) is not None]
    assert_refused(
        f"{operator.op}: expected {second} to be a DTensor",
        lambda mesh: results_of(operator, given | {first: place(given[first], mesh, Replicate())}),
    )
