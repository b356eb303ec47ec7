"""torch.onnx.export with the table of translations: onnxruntime against the operators."""

import numpy as np
import onnxruntime
import pytest
import torch
from support import ORDERS, name_of, random, random_positions, random_table, ulp
from torch.export import Dim

import rope_ext
from rope_ext import reference

onnx = pytest.importorskip("rope_ext.integrations.onnx", reason="needs onnxscript")

B, S, H, HK, D, L = 2, 5, 4, 2, 16, 40
OPSET = 23  # the first with RotaryEmbedding


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def to_onnx(function, inputs, opset_version=OPSET, dynamic=None):
    """The ONNX program of function(*inputs); `dynamic`: for each input, {dimension: name}."""
    model = function if isinstance(function, torch.nn.Module) else Function(function)
    return torch.onnx.export(
        model.eval(),
        inputs,
        dynamo=True,
        opset_version=opset_version,
        custom_translation_table=onnx.TRANSLATIONS,
        dynamic_shapes=None if dynamic is None else (tuple(dynamic),),
        verbose=False,
    )


def operators(program):
    return [node.op_type for node in program.model.graph]


def by_onnxruntime(program, inputs):
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]
