"""torch.onnx.export with the table of translations: onnxruntime compared to the operators."""

import copy
import inspect
import logging

import numpy as np
import onnxruntime
import pytest
import torch
from exported_block import EXPORTED, ROTATIONS, Layers
from exported_block import SIZES as BLOCK_SIZES
from exported_block import inputs as block_inputs
from support import (
    ORDERS,
    assert_near_exact,
    assert_same_bits,
    naming,
    random,
    random_positions,
    random_table,
    ulp,
)
from torch import nn

import rope_ext
from rope_ext.integrations.onnx import TRANSLATIONS

B, S, H, D, L = 2, 7, 3, 16, 40
R = 10  # of D channels, if a part rotates
SIZES = [(B, S), (3, 11), (1, 1)]  # batch and length; exported with the first
ANY = torch.export.Dim.AUTO
LIKE_X = {0: ANY, 1: ANY}


# How a token finds its row: the axes of tokens, of the table and of position_ids.
ROWS = {
    "table": ("BS", "L"),
    "table, [B, S]": ("BS", "L", "BS"),
    "table, [1, S]": ("BS", "L", "1S"),
    "table, [S]": ("BS", "L", "S"),
    "short table, packed": ("T", "4", "T"),
    "table, packed": ("T", "L"),
    "rows": ("BS", "BS"),
    "rows of one sequence": ("BS", "1S"),
    "rows, packed": ("T", "1T"),
}


class Case:
    """A call of apply_rotary. Tables have one angle a pair or, with rotary_dim given and `full`,
    one a channel. `standard`: it becomes the operator RotaryEmbedding, with the expected bits.
    """

    def __init__(self, rows="table", *, dtype=torch.float32, full=False, standard=True, **options):
        self.rows, self.dtype, self.full, self.options = rows, dtype, full, options
        self.standard = standard
        self.table_dtype = options.pop("table_dtype", torch.float32)

    def inputs(self, batch, length):
        """x, cos, sin and position_ids or none; x in float32, as NumPy has no bfloat16."""
        sizes = {"B": batch, "S": length, "T": batch * length, "L": L, "4": 4, "1": 1}
        tokens, leading, *ids = ([sizes[axis] for axis in axes] for axes in ROWS[self.rows])
        dim = self.options.get("rotary_dim", D)
        table = random_table(*leading, dim if self.full else dim // 2, dtype=self.table_dtype)
        ids = [random_positions(*of, rows=leading[0], dtype=torch.int32) for of in ids]
        return random(*tokens, H, D, seed=1), *table, *ids

    def dynamic(self):
        x, table, *ids = (
            {i: ANY for i, axis in enumerate(axes) if axis in "BST"} for axes in ROWS[self.rows]
        )
        return (x, table, table, *ids)

    def rotated(self, x, *rest):
        """x rotated in its dtype, as by the operator."""
        return torch.ops.rope.apply_rotary(x, *rest, **self.options)

    def __call__(self, x, *rest):
        y = self.rotated(x.to(self.dtype), *rest)
        return y if self.dtype == torch.float64 else y.float()


TO_HALVES = {"interleaved": True, "interleaved_out": False}
CASES = {
    "rows 0, 1, 2, ...": Case(),
    "a position a token": Case("table, [B, S]"),
    "positions for all sequences": Case("table, [1, S]"),
    "positions without batch": Case("table, [S]"),
    "rows": Case("rows"),
    "rows for all sequences": Case("rows of one sequence"),
    "packed": Case("table, packed"),
    "packed, more tokens than rows": Case("short table, packed"),
    "packed, a row a token": Case("rows, packed"),
    "packed, a row a token, W = R": Case("rows, packed", full=True, rotary_dim=R, standard=False),
    **{
        f"{name}{', inverse' * inverse}": Case("table, [B, S]", inverse=inverse, **order)
        for (name, order), inverse in zip(ORDERS.items(), (False, True, True, False), strict=True)
    },
    "a part": Case("rows", rotary_dim=R),
    "a part in the middle, interleaved": Case(rotary_dim=R, rotary_offset=2, interleaved=True),
    "the last channels": Case("table, [B, S]", rotary_dim=R, rotary_offset=D - R, **TO_HALVES),
    "bfloat16": Case("table, [B, S]", dtype=torch.bfloat16),
    "float16, float16 tables": Case(dtype=torch.float16, table_dtype=torch.float16),
    "float64 tables": Case("rows", table_dtype=torch.float64),
    # not possible with the standard operator
    "float64": Case("table, [B, S]", dtype=torch.float64, standard=False),
    "float64, packed": Case("short table, packed", dtype=torch.float64, standard=False),
    **{
        f"one angle a channel, {name}{', inverse' if inverse else ''}": Case(
            rows, full=True, rotary_dim=R, rotary_offset=1, inverse=inverse, standard=False, **order
        )
        for name, order in ORDERS.items()
        for inverse, rows in ((False, "table, [B, S]"), (True, "rows of one sequence"))
    },
    "W = R, bfloat16": Case(full=True, rotary_dim=D, dtype=torch.bfloat16, standard=False),
}


class Calls(nn.Module):
    """Each function on its own inputs, as one program."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, inputs):
        return [f(*x) for f, x in zip(self.functions, inputs, strict=True)]


def to_onnx(model, inputs, *, dynamic, opset_version=23):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not installed
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic, strict=False)
    options = {"dynamo": True, "custom_translation_table": TRANSLATIONS, "verbose": False}
    return torch.onnx.export(program, opset_version=opset_version, **options)


def test_translations_take_what_the_operators_take():
    for operator, translation in TRANSLATIONS.items():
        names = [argument.name for argument in operator._schema.arguments]
        assert list(inspect.signature(translation).parameters) == names, operator


def count(program, operator):
    return sum(node.op_type == operator for node in program.model.graph)


def session_of(program):
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run(session, inputs):
    """Runs tensors of `inputs`, in order, in onnxruntime."""
    named = zip(session.get_inputs(), inputs, strict=True)
    outputs = session.run(None, {given.name: np.asarray(x) for given, x in named})
    return [torch.from_numpy(y) for y in outputs]


@pytest.mark.parametrize(("opset_version", "names"), [(23, CASES), (20, [*CASES][:20:3])])
def test_rotations_are_the_operators_own(opset_version, names):
    """As one ONNX program; each with one standard operator, where there is one since version 23."""
    cases = {name: CASES[name] for name in names}
    given = [case.inputs(*SIZES[0]) for case in cases.values()]
    dynamic = [case.dynamic() for case in cases.values()]
    calls = Calls(list(cases.values()))
    program = to_onnx(calls, (given,), dynamic=(dynamic,), opset_version=opset_version)
    standard = {name for name in cases if CASES[name].standard and opset_version >= 23}
    assert count(program, "RotaryEmbedding") == len(standard)
    assert program.model.opset_imports == {"": opset_version}

    session = session_of(program)
    for size in SIZES:
        given = [case.inputs(*size) for case in cases.values()]
        outputs = run(session, [x for of_case in given for x in of_case])
        for (name, case), (x, *rows), got in zip(cases.items(), given, outputs, strict=True):
            x, got = x.to(case.dtype), got.to(case.dtype)
            with naming((name, size)):
                if name in standard:  # it may contract a product and a sum
                    assert_near_exact(got, x, *rows, **case.options)
                else:
                    assert_same_bits(got, case.rotated(x, *rows))


def results(model, inputs, dynamic):
    """What onnxruntime and the model give for all inputs; exported with the first."""
    session = session_of(to_onnx(model, inputs[0], dynamic=dynamic))
    for arguments in inputs:
        for got, expected in zip(run(session, arguments), model(*arguments), strict=True):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            yield got, expected


class Tables(nn.Module):
    def __init__(self, inv_freq):
        super().__init__()
        self.inv_freq = nn.Buffer(inv_freq)

    def forward(self, position_ids):
        length = position_ids.shape[1]
        scaled = {"start": length - 3, "attention_scaling": 1.25}
        cache = rope_ext.cos_sin_cache(self.inv_freq, length, **scaled)
        rows = rope_ext.cos_sin(self.inv_freq, position_ids, attention_scaling=0.75)
        wide = rope_ext.cos_sin(self.inv_freq, position_ids[0], dtype=torch.float64)
        return *cache, *rows, *wide


def test_tables_are_exact_to_one_rounding():
    """Positions below 2^29 times 24 bits of inv_freq are exact in float64. Their sine is off by an
    ulp, 2^-53, and attention_scaling rounds by as much. So float32 results are equal, unless the
    exact value is that close to a midpoint: then one ulp.
    """
    inv_freq, _ = rope_ext.frequencies.default(64)
    model = Tables(inv_freq)
    positions = [(random_positions(*size, rows=2**29) - 1000,) for size in ((2, 4), (3, 200))]
    for got, expected in results(model, positions, dynamic=(LIKE_X,)):
        error = (got.double() - expected.double()).abs()
        if got.dtype == torch.float32:
            assert (error <= ulp(expected.double(), torch.float32)).all()
            assert (error > 0).float().mean() < 1e-3
        else:
            assert error.max() <= 2.0**-51


class ByAngles(nn.Module):
    """Rows of three axes, and rotations without a table."""

    def __init__(self):
        super().__init__()
        self.inv_freq = nn.Buffer(rope_ext.frequencies.default(16)[0])
        self.axes = nn.Buffer(torch.arange(8) % 3)

    def forward(self, q, k, positions):
        of_axes = rope_ext.cos_sin(self.inv_freq, positions, axes=self.axes, dtype=torch.float64)
        options = {"axes": self.axes, "attention_scaling": 1.25, "rotary_offset": 3}
        return (
            *of_axes,
            *rope_ext.apply_rotary_qk_at(q, k, self.inv_freq),
            *rope_ext.apply_rotary_qk_at(q, k, self.inv_freq, positions[0], interleaved=True),
            *rope_ext.apply_rotary_qk_at(q, k, self.inv_freq, positions, inverse=True, **options),
            *rope_ext.apply_rotary_qk_at(q[0], k[0], self.inv_freq, positions[0, 0], layout="thd"),
        )


def test_rotation_by_angles():
    """Angles below 2^9 are rounded to float64: cos and sin are off by at most 2^-44. In float32
    rows and rotations are rounded like ours, each by 2^-24 of less than twice the largest.
    """
    model = ByAngles()

    def inputs(batch, seq):
        q, k = random(batch, seq, 4, 24), random(batch, seq, 2, 24, seed=1)
        return q, k, 100 * random(3, batch, seq)

    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=3)
    like_x = {0: batch, 1: length}
    dynamic = like_x, like_x, {1: batch, 2: length}
    for got, expected in results(model, [inputs(2, 4), inputs(3, 50)], dynamic):
        allowed = 2.0**-44 if got.dtype == torch.float64 else 2.0**-21 * expected.abs().max()
        assert (got - expected).abs().max() <= allowed


def assert_as_near_to_float64(program, model):
    """Sums of products have another order in onnxruntime, so both are compared with float64."""
    session = session_of(program)
    for size in BLOCK_SIZES:
        x, position_ids = block_inputs(*size)
        (got,) = run(session, [x, position_ids])
        with torch.no_grad():
            ours = model(x, position_ids)
            exact = copy.deepcopy(model).double()(x.double(), position_ids)
        assert (got - exact).abs().max() <= 2 * (ours - exact).abs().max()
        assert (ours - exact).abs().max() < 1e-5


@pytest.mark.slow
def test_model_is_as_near_to_float64_as_in_pytorch():
    """Six layers of attention, each with a different way to rotate."""
    model = Layers(ROTATIONS)
    program = to_onnx(model, block_inputs(*EXPORTED), dynamic=(LIKE_X, LIKE_X))
    assert count(program, "RotaryEmbedding") == 2 * len(ROTATIONS)
    assert_as_near_to_float64(program, model)


def test_rotation_in_place_is_refused_by_name_unless_decomposed():
    model = Layers(["in_place"])
    arguments = {"inputs": block_inputs(*EXPORTED), "dynamic": (LIKE_X, LIKE_X)}
    with torch.no_grad():
        with pytest.raises(torch.onnx.OnnxExporterError, match=r"rope\.apply_rotary_qk_"):
            to_onnx(model, **arguments)
        with rope_ext.lowering("decompose"):
            program = to_onnx(model, **arguments)
    assert_as_near_to_float64(program, model)


def test_position_outside_of_the_table_and_short_table_are_refused():
    """By the standard operator, and by the translation of a rotation in float64."""
    for dtype in (torch.float32, torch.float64):
        cases = [Case("table, [B, S]", dtype=dtype), Case(dtype=dtype)]
        given, also = (case.inputs(B, S) for case in cases)
        dynamic = [case.dynamic() for case in cases]
        session = session_of(to_onnx(Calls(cases), ([given, also],), dynamic=(dynamic,)))
        run(session, [*given, *also])
        for position in (-1, L):
            wrong = given[3].clone()
            wrong[1, 2] = position
            with pytest.raises(Exception, match=r"out of (range|data bounds)"):
                run(session, [*given[:3], wrong, *also])
        with pytest.raises(Exception, match=r"cos_cache|out of data bounds"):
            run(session, [*given, random(1, L + 1, H, D), *also[1:]])
