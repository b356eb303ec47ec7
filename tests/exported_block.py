"""Attention blocks for export, and the files that a program without Python reads.

    python tests/exported_block.py FOLDER

writes op.pt2 and decompose.pt2, a model packaged by AOTInductor with either lowering, and for each
NAME.cases, inputs and outputs of other sizes than those of the export.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rope_ext

HEADS, KV_HEADS, HEAD_DIM, ROWS = 4, 2, 16, 64
DIM = HEADS * HEAD_DIM
EXPORTED = (2, 8)  # batch and length
SIZES = [(3, 17), (1, 5)]  # sizes that it runs with


class Attention(nn.Module):
    """Attention as in Llama: grouped heads, causal. `rotation` names the method that rotates."""

    def __init__(self, rotation: str) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.rotate = getattr(self, rotation)
        inv_freq, _ = rope_ext.frequencies.default(HEAD_DIM)
        cos, sin = rope_ext.cos_sin_cache(inv_freq, ROWS)
        self.inv_freq, self.cos, self.sin = map(nn.Buffer, (inv_freq, cos, sin))
        self.module = rope_ext.RotaryEmbedding(HEAD_DIM, max_position_embeddings=ROWS)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """X [B, S, DIM], position_ids [B, S]."""
        q, k, v = (f(x).unflatten(-1, (-1, HEAD_DIM)) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q, k, position_ids)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(-2))

    def table(self, q, k, position_ids):
        return rope_ext.apply_rotary_qk(q, k, self.cos, self.sin)

    def positions(self, q, k, position_ids):
        return rope_ext.apply_rotary_qk(q, k, self.cos, self.sin, position_ids)

    def frequencies(self, q, k, position_ids):
        cos, sin = rope_ext.cos_sin(self.inv_freq, position_ids)
        return rope_ext.apply_rotary_qk(q, k, cos, sin)

    def length(self, q, k, position_ids):
        cos, sin = rope_ext.cos_sin_cache(self.inv_freq, q.shape[1])
        return rope_ext.apply_rotary(q, cos, sin), rope_ext.apply_rotary(k, cos, sin)

    def in_place(self, q, k, position_ids):
        return rope_ext.apply_rotary_qk(q, k, self.cos, self.sin, position_ids, inplace=True)

    def embedding(self, q, k, position_ids):
        return self.module(q, k, position_ids)


ROTATIONS = ["table", "positions", "frequencies", "length", "in_place", "embedding"]
PACKAGED = ["frequencies", "length", "in_place"]  # each takes a C++ compiler seconds


class Layers(nn.Module):
    """Several ways to rotate, one after the other. The weights are always the same."""

    def __init__(self, rotations: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(rotation) for rotation in rotations)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, position_ids)
        return x


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + length)
    x = torch.randn(batch, length, DIM, generator=generator)
    return x, torch.randint(0, ROWS, (batch, length), generator=generator)


def exported(model: nn.Module, **options: object) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=ROWS)}
    options["dynamic_shapes"] = sizes, sizes
    return torch.export.export(model.eval(), inputs(*EXPORTED), **options)


def packaged(lowering: str, folder: Path) -> Path:
    """Layers(PACKAGED) compiled by AOTInductor; without gradients, so in_place stays in place."""
    with torch.no_grad(), rope_ext.lowering(lowering):
        program = exported(Layers(PACKAGED))
    file = folder / f"{lowering}.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return file


if __name__ == "__main__":
    for lowering in ("op", "decompose"):
        file = packaged(lowering, Path(sys.argv[1]))
        run = torch._inductor.aoti_load_package(str(file))
        cases = [{"inputs": list(x), "outputs": [run(*x)]} for x in (inputs(*n) for n in SIZES)]
        torch.save(cases, file.with_suffix(".cases"))
