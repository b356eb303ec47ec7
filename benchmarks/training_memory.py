"""Counts the memory that a rotation takes in training: kept for the backward, and at most at once.

    python benchmarks/training_memory.py [--tokens N] [--out DIR]

q and k of Llama-3-8B in bfloat16, with the norm of Qwen3 before the rotation or without, one
sequence, eager. Counts of bytes, not times: they are the same on every machine. `kept`: storages
that autograd saves, without tables and weights. `peak`: memory allocated at once from the forward
to the end of the backward, beside q, k, tables, weights and the incoming gradients.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from report import row
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import rope_ext

HEADS, KEY_HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 4096
EPS = 1e-6
ROTATION, NORMED, TRANSFORMERS = "rotation", "norm and rotation", "transformers"
COLUMNS = ("case", "way", "kept_bytes", "peak_bytes", "qk_bytes")

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ways(tokens: int) -> tuple[dict[tuple[str, str], Rotation], list[Tensor]]:
    """Functions of q [1, S, Hq, D] and k [1, S, Hk, D], by case and name; tables and weights."""
    inv_freq, _ = rope_ext.frequencies.default(HEAD_DIM)
    table = rope_ext.cos_sin_cache(inv_freq, tokens)
    cos, sin = (torch.cat((rows, rows), -1)[None].bfloat16() for rows in table)
    norms = [Qwen3RMSNorm(HEAD_DIM, EPS).bfloat16() for _ in "qk"]
    weights = [norm.weight for norm in norms]

    def of_transformers(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    def normed(rotate: Rotation) -> Rotation:
        return lambda q, k: rotate(norms[0](q), norms[1](k))

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope_ext.apply_rotary_qk(q, k, *table)

    def ours_with_norm(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope_ext.rms_norm_rotary_qk(q, k, *weights, *table, eps=EPS)

    found = {
        (ROTATION, TRANSFORMERS): of_transformers,
        (ROTATION, "apply_rotary_qk"): ours,
        (NORMED, TRANSFORMERS): normed(of_transformers),
        (NORMED, "the same norm, apply_rotary_qk"): normed(ours),
        (NORMED, "rms_norm_rotary_qk"): ours_with_norm,
    }
    return found, [*table, cos, sin, *weights]


def peak(step: Callable[[], object]) -> int:
    """Bytes allocated at once, at most, in a call of step whose results are dropped."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(rotate: Rotation, tokens: int, constants: list[Tensor]) -> tuple[int, int]:
    """Bytes kept for the backward, and the peak."""
    q, k = (
        torch.randn(1, tokens, heads, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS)
    )
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = rotate(q, k)
    for constant in constants:
        kept.pop(constant.untyped_storage().data_ptr(), None)
    grads = [torch.randn_like(y) for y in outputs]
    del outputs
    return sum(kept.values()), peak(lambda: torch.autograd.grad(rotate(q, k), (q, k), grads))


def run(tokens: int) -> list[dict[str, object]]:
    qk = tokens * (HEADS + KEY_HEADS) * HEAD_DIM * torch.bfloat16.itemsize
    found, constants = ways(tokens)
    return [
        dict(zip(COLUMNS, (case, way, *measure(rotate, tokens, constants), qk), strict=True))
        for (case, way), rotate in found.items()
    ]


def markdown(results: list[dict[str, object]]) -> str:
    versions = f"torch {torch.__version__}, rope_ext {rope_ext.__version__}"
    lines = [f"Times the bytes of q and k, {results[0]['qk_bytes'] / 2**20:g} MiB; {versions}."]
    lines += ["", "| case | way | kept | peak |", "|---" * 4 + "|"]
    for of in results:
        cells = [f"{of[name] / of['qk_bytes']:.2f}" for name in ("kept_bytes", "peak_bytes")]
        lines.append(row([of["case"], of["way"], *cells]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, help="folder for training_memory.md and .csv")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = run(arguments.tokens)
    text = markdown(results)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "training_memory.md").write_text(f"# training_memory\n\n{text}")
        with (arguments.out / "training_memory.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
