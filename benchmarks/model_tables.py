"""The tables of transformers' rotary modules at long context, before and after tables=True.

    python benchmarks/model_tables.py [--quick]

On the CPU, without timing, with the same results in every run: the largest error of cos and sin at
the 256 positions up to 131,072, against float64 for the module's own float32 frequencies. First the
rotations of published models, then the rotary module of every family with its default config.
"""

import argparse
import copy
import importlib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import machine
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLTextConfig

from rope_ext.integrations.transformers import UnrecognizedRotation, patch
from rope_ext.integrations.transformers.table_recognition import Form, Table, call, makes_tables
from rope_ext.integrations.transformers.tables import frequencies

LAST = 131_072
POSITIONS, QUICK_POSITIONS = 256, 4
F32, BF16 = torch.float32, torch.bfloat16
ORIGINAL = "original_max_position_embeddings"
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768, "rope_theta": 1e6}
DEEPSEEK = {
    "rope_type": "yarn",
    "factor": 40.0,
    ORIGINAL: 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
# Rises like the factors of Phi-3-mini-128k, one for each pair.
LONG = [1.07 * (64 / 1.07) ** (i / 47) for i in range(48)]
LONGROPE = {
    "rope_type": "longrope",
    ORIGINAL: 4096,
    "short_factor": [1.0] * 48,
    "long_factor": LONG,
}
HEADS_128 = {"hidden_size": 4096, "num_attention_heads": 32}
MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "Llama-2-7B": (LlamaRotaryEmbedding, transformers.LlamaConfig(**HEADS_128)),
    "the same, dynamic NTK": (
        LlamaRotaryEmbedding,
        transformers.LlamaConfig(
            max_position_embeddings=4096, **HEADS_128,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
    ),
    "Llama-3.1-8B": (
        LlamaRotaryEmbedding,
        transformers.LlamaConfig(
            max_position_embeddings=LAST, **HEADS_128,
            rope_parameters={**LLAMA31, ORIGINAL: 8192, "rope_theta": 5e5},
        ),
    ),
    "Llama 4 (complex)": (Llama4TextRotaryEmbedding, transformers.Llama4TextConfig()),
    "Qwen2.5-7B, YaRN": (
        Qwen2RotaryEmbedding,
        transformers.Qwen2Config(
            hidden_size=3584, num_attention_heads=28, max_position_embeddings=LAST,
            rope_parameters=YARN,
        ),
    ),
    "Qwen2-VL-7B (M-RoPE)": (
        Qwen2VLRotaryEmbedding,
        Qwen2VLTextConfig(hidden_size=3584, num_attention_heads=28, rope_parameters=MROPE),
    ),
    "Phi-3-mini-128k, LongRoPE": (
        Phi3RotaryEmbedding,
        transformers.Phi3Config(
            hidden_size=3072, num_attention_heads=32, max_position_embeddings=LAST,
            rope_parameters={**LONGROPE, "rope_theta": 1e4},
        ),
    ),
    "DeepSeek-V3, YaRN": (
        DeepseekV3RotaryEmbedding,
        transformers.DeepseekV3Config(
            max_position_embeddings=163_840, rope_parameters={**DEEPSEEK, "rope_theta": 1e4}
        ),
    ),
    "gpt-oss, YaRN": (GptOssRotaryEmbedding, transformers.GptOssConfig()),
    "Gemma 3": (Gemma3RotaryEmbedding, transformers.Gemma3TextConfig()),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The largest errors of cos and sin: of a model's own tables, and of those of tables=True."""

    name: str
    own: float  # of a model in float32
    loaded: float  # in bfloat16 by from_pretrained(dtype=torch.bfloat16)
    cast: float  # by model.to(torch.bfloat16)
    exact: float  # tables=True, the largest of these three


def measured(name: str, module: nn.Module, count: int) -> Iterator[Row]:
    """A row for each layer type. Raises UnrecognizedRotation."""
    exact = copy.deepcopy(module)
    patch(exact, tables=True)
    for layer_type, table in exact._rope_ext_tables.items():
        yield row(
            f"{name}, {layer_type}" if layer_type else name, module, exact, layer_type, table, count
        )


def row(
    name: str, own: nn.Module, exact: nn.Module, layer_type: str | None, table: Table, count: int
) -> Row:
    """own, exact: a module without and with exact tables. Both stay as they are."""
    positions = torch.arange(LAST + 1 - count, LAST + 1)
    position_ids = in_form(positions, table.form)
    pairs = list(next(iter(table.form.columns.values())).pairs)
    scaling = getattr(own, f"{table.prefix}attention_scaling", 1.0)

    def error(module: nn.Module, dtype: torch.dtype, inv_freq: Tensor) -> float:
        made = call(
            copy.deepcopy(module), torch.zeros(1, 1, 8, dtype=dtype), position_ids, layer_type
        )
        cos, sin = (made.real, made.imag) if table.form.is_complex else made
        angle = positions[:, None].double() * inv_freq.double()[pairs]
        off = (
            cos.reshape(angle.shape) - angle.cos() * scaling,
            sin.reshape(angle.shape) - angle.sin() * scaling,
        )
        return max(float(each.abs().max()) for each in off)

    called = copy.deepcopy(own)
    call(called, torch.zeros(1, 1, 8), position_ids, layer_type)
    theirs = getattr(called, f"{table.prefix}inv_freq")  # of this length
    ours = frequencies(copy.deepcopy(exact), table, position_ids)
    low = copy.deepcopy(exact).bfloat16()
    return Row(
        name,
        error(own, F32, theirs),
        error(own, BF16, theirs),
        error(copy.deepcopy(own).bfloat16(), BF16, theirs),
        max(error(exact, F32, ours), error(exact, BF16, ours), error(low, BF16, ours)),
    )


def in_form(positions: Tensor, form: Form) -> Tensor:
    """positions [N] as position_ids, the same for all coordinates."""
    count = next(iter(form.columns))
    if form.axis is None:
        return positions[None]
    if form.axis == 0:
        return positions.expand(count, 1, -1)
    position_ids = positions[:, None].expand(-1, count)
    return position_ids if form.dims == 2 else position_ids[None]


def every_family() -> Iterator[tuple[str, nn.Module]]:
    """The rotary modules of all families that can be made of their default configs."""
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    for family in sorted(file.parent.name for file in files):
        try:
            file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:
            continue
        for name, kind in vars(file).items():
            if not (inspect.isclass(kind) and issubclass(kind, nn.Module) and "Rotary" in name):
                continue
            try:
                hints = typing.get_type_hints(kind.__init__)
                yield name, kind(hints["config"]())
            except Exception:  # its default config lacks what it needs, or belongs to another part
                continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds: does everything run?")
    quick = parser.parse_args().quick
    count = QUICK_POSITIONS if quick else POSITIONS
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # of incomplete configs
    print(f"{count} positions up to {LAST:,}; transformers {transformers.__version__}; {machine()}")
    print("\n| rotation | own, float32 | loaded in bfloat16 | .to(bfloat16) | tables=True |")
    print("|---|---|---|---|---|")
    for name, (kind, config) in MODELS.items():
        for row in measured(name, kind(config), count):
            print(
                f"| {row.name} | {row.own:.2g} | {row.loaded:.2g} | {row.cast:.2g} "
                f"| {row.exact:.2g} |"
            )
    rows, refused = [], []
    for name, module in every_family():
        if name.endswith("VisionRotaryEmbedding") or not makes_tables(module):
            continue
        try:
            rows += measured(name, module, count)
        except UnrecognizedRotation:
            refused.append(name)
    for what in ("own", "loaded", "cast", "exact"):
        errors = sorted(getattr(row, what) for row in rows)
        print(f"{what}: {errors[0]:.2g} to {errors[-1]:.2g} in {len(rows)} tables of all families")
    print(f"refused: {', '.join(refused)}")


if __name__ == "__main__":
    main()
