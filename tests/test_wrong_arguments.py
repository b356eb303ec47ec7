"""Arguments of another type, dtype or layout: the error names them, and the remedy."""

import re
import traceback
import types
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from operator_arguments import Sizes, tensors_of
from support import assert_same_bits, name_of, random, random_table
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import rope_ext
from rope_ext import RotaryEmbedding, frequencies, positions
from rope_ext._operators import OPERATORS

rope = torch.ops.rope

B, S, H, K, D, P, L = 2, 5, 4, 2, 16, 8, 9
SIZES = Sizes(B, S, H, K, D, L)
F8 = torch.float8_e4m3fn
cos, sin = random_table(L, P)
MODULE = RotaryEmbedding(D, max_position_embeddings=64)


def tensors():
    """A tensor for each argument name of the functions and operators."""
    given = tensors_of(SIZES)
    return {**given, "slot_mapping": given["slot_mapping"].flatten()}  # taken by all


# By their names in errors; and the arguments that a good call omits.
FUNCTIONS = {
    **{f"rope_ext.{o.name}": getattr(rope_ext, o.name) for o in OPERATORS
       if o.name in rope_ext.__all__},
    "RotaryEmbedding": MODULE.forward,
    "RotaryEmbedding.cos_sin": MODULE.cos_sin,
    "RotaryEmbedding.table": MODULE.table,
}  # fmt: skip
OMITTED = {"out", "axes"}
WRONG = {  # values of other types; None is allowed if the annotation says so
    Tensor: (None, [1.0, 2.0], np.ones(3), 1.5, "x", Tensor),
    int: (None, "64", 64.5, [1], torch.ones(2)),
    float: (None, "1", [1.0]),
    bool: ("yes", (1, 2)),
    torch.dtype: ("float32", 99),
    tuple[Tensor, Tensor]: (torch.ones(2, 3), (torch.ones(3),), (torch.ones(3), None)),
}


def wrong_values(name, annotation):
    """Values that an argument's annotation does not allow."""
    kinds = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    values = [value for kind in kinds for value in WRONG.get(kind, ())]
    if any(get_origin(kind) is Literal for kind in kinds):
        values = [None, [], 7]
    if Tensor in kinds:  # an int may also be a Tensor or None
        values = [value for value in values if not isinstance(value, Tensor)]
    if name == "inplace":
        values += [None, 0, torch.tensor(True)]
    if types.NoneType in kinds:
        values = [value for value in values if value is not None]
    return values


@pytest.mark.parametrize("name", FUNCTIONS)
def test_argument_of_another_type_is_named_and_nothing_written(name):
    function = FUNCTIONS[name]
    annotations = {n: kind for n, kind in function.__annotations__.items() if n != "return"}
    by = f"({name}|rope_ext.apply_rotary_qk)" if name == "RotaryEmbedding" else name
    for inplace in (False, True) if "inplace" in annotations else (False,):
        given = {n: t for n, t in tensors().items() if n in annotations and n not in OMITTED}
        if inplace:
            given["inplace"] = True
        kept = {n: (t.clone(), t._version) for n, t in given.items() if isinstance(t, Tensor)}
        for argument, annotation in annotations.items():
            values = wrong_values(argument, annotation)
            assert values, f"no wrong value of {argument}"
            for value in values:
                with pytest.raises(TypeError) as refusal:
                    function(**{**given, argument: value})
                expected = rf"{by}: expected {argument}\S* to be [^\n]+, got [^\n]+"
                message = str(refusal.value)
                assert re.fullmatch(expected, message), message
                assert "During handling" not in "".join(traceback.format_exception(refusal.value))
                for n, (bits, version) in kept.items():
                    assert_same_bits(given[n], bits, message)
                    assert given[n]._version == version, message
        function(**given)  # otherwise the errors above prove nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos": np.ones(3)}, "expected cos to be a Tensor, got a numpy.ndarray: torch.as_tensor "
         "makes one of it"),
        ({"cos": ...}, "expected cos to be a Tensor, got an ellipsis"),
        ({"rotary_offset": 2**63}, f"expected rotary_offset to be an int, got {2**63}, "
         "which 64 bits do not hold"),
        ({"layout": None}, "expected layout to be one of bshd, bhsd, sbhd, thd, got None"),
        ({"out": torch.ones(3)}, "expected out to be two Tensors or None, got a Tensor"),
        ({"out": (torch.ones(3), Tensor)}, "expected out[1] to be a Tensor, got the class "
         "torch.Tensor"),
    ],
    ids=str,
)  # fmt: skip
def test_words_of_a_refusal(change, message):
    given = {n: tensors()[n] for n in ("q", "k", "cos", "sin", "position_ids")}
    with pytest.raises(TypeError, match=f"^rope_ext.apply_rotary_qk: {re.escape(message)}$"):
        rope_ext.apply_rotary_qk(**{**given, **change})


def test_an_argument_that_pytorch_converts_is_not_blamed_for_another_mistake():
    given = {n: tensors()[n] for n in ("x", "cos", "sin", "position_ids")}
    as_good = {"rotary_dim": np.int64(D), "rotary_offset": torch.tensor(0), "inverse": 1}
    rope_ext.apply_rotary(**given, **as_good)
    given["position_ids"][0, 3] = L
    with pytest.raises(RuntimeError, match=r"^rope::apply_rotary: expected position_ids in"):
        rope_ext.apply_rotary(**given, **as_good)


def test_argument_of_another_type_beside_a_compiler():
    """In a full graph the operator raises; between parts of a graph the function does."""

    def rotate(x, cos, **options):
        return rope_ext.apply_rotary(x, cos, sin, **options)

    x = random(B, S, H, D)
    for fullgraph in (True, False):
        compiled = torch.compile(rotate, backend="eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError, match=r"rope::apply_rotary: expected cos .*, got None"):
            compiled(x, None)
        with pytest.raises(Exception, match="expected inplace to be a bool, got 'no'"):
            compiled(x, cos, inplace="no")
    with pytest.raises(TypeError, match=r"^rope_ext.apply_rotary: expected x .*, got None$"):
        compiled(None, cos)


# ---- operators: None and every dtype


every = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def call_by_name(operator, given):
    """Positional arguments that are not given are None."""
    given = {n: t for n, t in given.items() if n in operator.defaults}
    positional = [given.pop(name, None) for name in operator.positional]
    return operator.overload(*positional, **given)


@every
def test_operator_names_the_argument_that_is_none(operator):
    call_by_name(operator, tensors())
    for argument in operator.arguments:
        if str(argument.type) != "Tensor" or (argument.name, operator.name) == (
            "inv_freq", "cos_sin_cache",  # without a tensor the dispatcher has no kernel
        ):  # fmt: skip
            continue
        message = rf"^{operator.op}: expected {argument.name} .*, got None$"
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            call_by_name(operator, {**tensors(), argument.name: None})


TAKEN = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64,
         F8, torch.float8_e5m2}  # fmt: skip
DTYPES = {v for v in vars(torch).values() if isinstance(v, torch.dtype)} - TAKEN


@pytest.mark.filterwarnings("ignore::UserWarning")
@every
def test_operator_names_every_dtype_that_it_does_not_take(operator):
    given = tensors()
    for argument in (n for n in operator.tensors if n in given):
        for dtype in DTYPES:
            got = {"bit": "uint1"}.get(name_of(dtype), name_of(dtype))
            newer = "a dtype that this build does not know"  # under a later PyTorch
            message = rf"^{operator.op}: expected {argument} .*, got ({got}|{newer})( \[.*)?$"
            other = torch.empty(given[argument].shape, dtype=dtype)
            with pytest.raises(RuntimeError, match=message):
                call_by_name(operator, {**given, argument: other})


def test_dtype_of_a_table_that_pytorch_can_not_pass_on():
    for dtype in DTYPES:
        for function, args in (
            (rope_ext.cos_sin_cache, (torch.ones(P), 3)),
            (rope_ext.cos_sin, (torch.ones(P), torch.arange(3))),
        ):
            expected = f"^rope_ext.{function.__name__}: expected dtype to be float64, "
            with pytest.raises(RuntimeError, match=rf"{expected}.*, got {name_of(dtype)}$"):
                function(*args, dtype=dtype)


def test_tensors_are_released_where_a_dtype_can_not_be_passed_on():
    """For such a dtype the stable ABI throws while the other arguments are still on its stack."""
    inv_freq, position_ids = torch.ones(P), torch.arange(3)
    given = [StorageWeakRef(t.untyped_storage()) for t in (inv_freq, position_ids)]
    with pytest.raises(RuntimeError, match="Not yet supported ScalarType"):
        torch.ops.rope.cos_sin(inv_freq, position_ids, dtype=torch.float8_e8m0fnu)
    del inv_freq, position_ids
    assert all(tensor.expired() for tensor in given)


# ---- positions, frequencies, models


IDS, OF_AXES = torch.tensor([0, 2]), torch.ones(3, 1, 2)
POSITIONS = [  # the argument that is no tensor, and the call
    ("cu_seqlens", positions.from_cu_seqlens),
    ("cu_seqlens", positions.sequence_of_tokens),
    ("cu_seqlens", lambda bad: positions.context_parallel(8, 2, 0, cu_seqlens=bad)),
    ("attention_mask", positions.from_attention_mask),
    ("attention_mask", lambda bad: positions.mrope_batch([[1]], bad)),
    ("block_table", lambda bad: positions.slot_mapping(bad, IDS[None], 4)),
    ("positions", lambda bad: positions.slot_mapping(IDS[None], bad, 4)),
    ("sequence", lambda bad: positions.slot_mapping(IDS[None], IDS, 4, bad)),
    ("mask", lambda bad: positions.slot_mapping(IDS[None], IDS[None], 4, mask=bad)),
    ("kv_indptr", lambda bad: positions.slot_mapping(IDS, IDS[None], 4, kv_indptr=bad)),
    ("kv_indptr", lambda bad: positions.seq_lens(bad, IDS, 4)),
    ("kv_last_page_len", lambda bad: positions.seq_lens(IDS, bad, 4)),
    ("cos", lambda bad: positions.mrope_rows(bad, OF_AXES, IDS)),
    ("sin", lambda bad: positions.mrope_rows(OF_AXES, bad, IDS)),
    ("axes", lambda bad: positions.mrope_rows(OF_AXES, OF_AXES, bad)),
]


def test_positions_of_what_is_no_tensor():
    for argument, call in POSITIONS:
        message = rf"^rope_ext\.positions\.\w+: expected {argument} to be a Tensor, got "
        for bad in ([0, 2], np.arange(3), 1.5):
            with pytest.raises(TypeError, match=message):
                call(bad)


def test_positions_of_other_types():
    for call, message in (
        (lambda: positions.mrope(5), "mrope: expected segments to be a list, got 5"),
        (lambda: positions.mrope_batch(None), "mrope_batch: expected sequences to be a list"),
        (lambda: positions.mrope_axes(None), "mrope_axes: expected sections to be a list"),
        (lambda: positions.axial_axes(5), "axial_axes: expected pairs_per_axis to be a list"),
        (lambda: positions.patch_centers(2, 2, dtype="float32"), "patch_centers: expected dtype "
         "to be a torch.dtype, got 'float32'"),
        (lambda: positions.mrope([(1, 2, 3, "4")]), r"mrope: expected segments\[0\]\[3\] to be a "
         "float, got '4'"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"^rope_ext\.positions\.{message}"):
            call()


def test_name_of_a_config_is_refused_with_what_loads_it():
    for config, advice in (
        ("meta-llama/Llama-3.2-1B", r"AutoConfig.from_pretrained\('meta-llama/Llama-3.2-1B'\)"),
        (Path("model/config.json"), r"json.load\(open\('model/config.json'\)\)"),
        (dict, r"got the class dict: dict\(\)"),
    ):
        for load in (frequencies.from_config, RotaryEmbedding.from_config):
            with pytest.raises(ValueError, match=f"expected config to be a config obj.*{advice}"):
                load(config)


def test_name_of_a_model_is_refused_with_what_loads_it():
    transformers = pytest.importorskip("transformers")
    from rope_ext.integrations.transformers import patch, patched, unpatch

    for model, advice in (
        ("meta-llama/x", r"got 'meta-llama/x': AutoModelForCausalLM.from_pretrained\('meta-llama"),
        (Path("x"), r"AutoModelForCausalLM.from_pretrained\('x'\)"),
        ({}, "got a dict: AutoModelForCausalLM.from_pretrained"),
        (transformers.LlamaConfig(), r"AutoModelForCausalLM.from_config\(config\)"),
        (transformers.LlamaForCausalLM, r"LlamaForCausalLM.from_pretrained\(...\)"),
    ):
        for function in (patch, unpatch, lambda model: patched(model).__enter__()):
            with pytest.raises(TypeError, match=f"patch: expected model to be .*{advice}"):
                function(model)


# ---- remedies


def some(*names):
    """Some of the good arguments."""
    return {name: tensors()[name] for name in names}


ROWS = {"cos": random_table(1, S, P)[0], "sin": random_table(1, S, P)[1]}
LONG = {"cos": random_table(64, P)[0], "sin": random_table(64, P)[1]}
QK, WEIGHTS = ("q", "k"), ("q_weight", "k_weight")
CACHES = ("v", "k_cache", "v_cache", "slot_mapping")


def in_place(**given):
    return rope_ext.apply_rotary(**given, inplace=True)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (rope_ext.apply_rotary, ("x",)),
        (in_place, ("x",)),
        (rope_ext.apply_rotary_qk, QK),
        (rope_ext.rms_norm_rotary_qk, (*QK, *WEIGHTS)),
        (rope_ext.apply_rotary_qk_append_kv_, (*QK, *CACHES)),
        (rope_ext.apply_rotary_mla_append_, ("q", "k_pe", "kv_c", "kv_cache", "slot_mapping")),
    ],
)
def test_table_of_one_angle_a_channel_names_what_it_needs(function, names):
    given = some(*names, "cos", "sin")
    latent = function is rope_ext.apply_rotary_mla_append_
    advice = rf"give cos\[..., :{P}\] and sin\[..., :{P}\]$" if latent else f"rotary_dim={D}$"
    by_channel = {name: torch.cat((given[name], given[name]), -1) for name in ("cos", "sin")}
    with pytest.raises(RuntimeError, match=rf", got .*cat\(\(freqs, freqs\), -1\), .*{advice}"):
        function(**{**given, **by_channel})
    if not latent:
        function(**{**given, **by_channel}, rotary_dim=D)
    given["cos"] = given["sin"] = random(L, 2 * D)  # neither
    with pytest.raises(RuntimeError, match=f"got {4 * D}$"):
        function(**given)


LAYOUTS = {  # by the argument that gives the length of the sequence
    "positions": (rope_ext.apply_rotary, some("x", "cos", "sin", "position_ids")),
    "positions, in place": (in_place, some("x", "cos", "sin", "position_ids")),
    "rows": (rope_ext.apply_rotary, {**some("x"), **ROWS}),
    "a short table": (  # with more heads than rows
        rope_ext.apply_rotary,
        {"x": random(B, S, 2 * H, D), "cos": cos[:S], "sin": sin[:S]},
    ),
    "k": (rope_ext.apply_rotary_qk, {**some(*QK), **LONG}),
    "k, beside caches": (rope_ext.apply_rotary_qk_append_kv_, {**some(*QK, *CACHES), **LONG}),
    "k, beside weights": (rope_ext.rms_norm_rotary_qk, {**some(*QK, *WEIGHTS), **LONG}),
    "k, without a table": (rope_ext.apply_rotary_qk_at, some(*QK, "inv_freq")),
    "k, of a module": (MODULE, some(*QK)),
    "positions of a module": (MODULE, some(*QK, "position_ids")),
}


def heads_first(given):
    return {name: t.transpose(1, 2).contiguous() if name in ("x", "q", "k", "v") else t.clone()
            for name, t in given.items()}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_heads_where_the_sequence_should_be_name_the_layout(case):
    """And vice versa."""
    function, given = LAYOUTS[case]
    for layout, wrong in (("bhsd", heads_first(given)), ("bshd", given)):
        other = "bshd" if layout == "bhsd" else "bhsd"
        kept = {name: t.clone() for name, t in wrong.items()}
        with pytest.raises(ValueError, match=rf'expected [qx] to have .*: layout="{layout}" fits$'):
            function(**wrong, layout=other)
        for name, t in wrong.items():
            assert_same_bits(t, kept[name])
        function(**kept, layout=layout)


def test_length_that_fits_no_layout_is_left_to_the_operator():
    given = some(*QK, "cos", "sin")
    for change in (
        {"position_ids": torch.arange(S + 1)},
        {"k": random(B, S + 1, K, D)},
        {"k": random(B, 3, H, D)},  # H heads of another length, which does not divide q's S
        {"cos": cos[: S - 2], "sin": sin[: S - 2]},
    ):
        with pytest.raises(RuntimeError, match=r"^rope::apply_rotary_qk: expected (?!.*layout=)"):
            rope_ext.apply_rotary_qk(**{**given, **change})


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(("given_as", "fits"), [("NHD", "HND"), ("HND", "NHD")])
def test_cache_of_another_layout_names_it(given_as, fits, layout):
    append = partial(rope_ext.apply_rotary_qk_append_kv_, layout=layout)
    given = some(*QK, *CACHES, "cos", "sin")
    if layout == "bhsd":
        given = heads_first(given)
    for wrong in ("k_cache", "v_cache"):
        heads_second = [n for n in ("k_cache", "v_cache") if (n == wrong) == (fits == "HND")]
        caches = {name: given[name].transpose(1, 2) for name in heads_second}
        with pytest.raises(ValueError, match=rf'{wrong}.*cache_layout.*"{fits}" fits'):
            append(**{**given, **caches}, cache_layout=given_as)
    given["k_cache"] = torch.zeros(3, 8, K + 1, D).to(F8)
    with pytest.raises(RuntimeError, match=r"^rope::.* expected k_cache to have shape"):
        append(**given)


def test_packed_tokens_in_the_layout_of_a_batch_name_theirs():
    with pytest.raises(ValueError, match=r'got \[5, 4, 16\]: packed tokens .* layout="thd"$'):
        rope_ext.apply_rotary(random(S, H, D), cos, sin)


def test_leaf_in_place_names_what_to_do_instead():
    leaf = random(B, S, H, D).requires_grad_()
    for x in (leaf, leaf.view(B * S, H, D).view(B, S, H, D), (leaf * 2).chunk(2)[0]):
        with pytest.raises(RuntimeError, match=r"inplace=False, or a clone\(\) of it$"):
            rope_ext.apply_rotary(x, cos, sin, inplace=True)
        rope_ext.apply_rotary(x.clone(), cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match=r"inplace=False, or detach\(\) them$"):
        rope_ext.apply_rotary(leaf * 2, cos.clone().requires_grad_(), sin, inplace=True)
