"""Times a compiled Llama block with each lowering of the rotation: rope_ext.lowering.

    python benchmarks/bench_lowering.py [--quick] [--rounds N]

Attention with grouped heads and a gated MLP with the sizes of Llama-3.2-1B, in float32: a prompt,
and a training step without its optimizer, in interleaved rounds. Before it is timed, each result is
compared with that of the eager block.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from measuring import machine, measure, settle_allocator, summary
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import rope_ext
from rope_ext.lowering import Lowering

DIM, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN = 2048, 32, 8, 64, 8192
PROMPT, TRAINING, QUICK_SHARE = 512, 256, 16  # tokens
ROUNDS, QUICK_ROUNDS = 15, 3
TOLERANCE = 1e-4  # relative to the largest value: a compiled block sums in another order
EAGER = "eager"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KEY_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.gate_up = nn.Linear(DIM, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, DIM], cos and sin [L, P]."""
        qkv = self.qkv(rms_norm(x, (DIM,))).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, KEY_HEADS, KEY_HEADS), dim=2)
        q, k = rope_ext.apply_rotary_qk(q, k, cos, sin)
        y = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(rms_norm(x, (DIM,))).chunk(2, -1)
        return x + self.down(silu(gate) * up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    arguments = parser.parse_args()
    share = QUICK_SHARE if arguments.quick else 1
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    torch.manual_seed(0)
    settle_allocator()
    block = Block()
    table = rope_ext.cos_sin_cache(rope_ext.frequencies.default(HEAD_DIM)[0], PROMPT)
    print(machine(), "\n\nMedian (10th-90th percentile).\n")
    print("| case | way | milliseconds | to eager |\n|---|---|---|---|")

    def prompt(call: nn.Module) -> Tensor:
        with torch.inference_mode():
            return call(prompt_x, *table)

    def training(call: nn.Module) -> Tensor:
        (grad,) = torch.autograd.grad(call(training_x, *table).sum(), training_x)
        return grad

    prompt_x = torch.randn(1, PROMPT // share, DIM)
    training_x = torch.randn(1, TRAINING // share, DIM, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)

    def lowered(step: Callable[[nn.Module], Tensor], to: Lowering) -> Tensor:
        with rope_ext.lowering(to):
            return step(compiled)

    for name, step in (("prompt", prompt), ("training", training)):
        ways = {EAGER: functools.partial(step, block)}
        ways |= {to: functools.partial(lowered, step, to) for to in ("op", "decompose")}
        expected = ways[EAGER]()
        for to, way in ways.items():
            error = ((way() - expected).abs().max() / expected.abs().max()).item()
            if not error <= TOLERANCE:
                raise SystemExit(f"{to} is wrong: error {error:.3g} above {TOLERANCE:g}")
        times = measure(ways, rounds, lambda: None)
        for to, values in times.items():
            of = summary(values)
            pairs = zip(values, times[EAGER], strict=True)
            ratio = summary([a / b for a, b in pairs]).median
            spread = f"{1e3 * of.median:.1f} ({1e3 * of.low:.1f}-{1e3 * of.high:.1f})"
            print(f"| {name} | {to} | {spread} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
