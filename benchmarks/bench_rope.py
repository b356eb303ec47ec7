"""Times the rotation of q and k against eager PyTorch and against moving the same bytes.

    python benchmarks/bench_rope.py [--device cpu] [--rounds 30]

Every result is verified before it is timed. Times are medians of interleaved rounds with the 10th
to 90th percentile. What carries over between machines is the ratio to the floor: `rmw` for in place
(q.mul_(1), reads and writes every byte once), `clone` for out of place.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import rope_ext

# name, batch, sequence, heads of q, heads of k, head_dim, rotary_dim
CASES = [
    ("Llama-3-8B prefill", 1, 4096, 32, 8, 128, 128),
    ("Llama-3-8B decode", 1, 1, 32, 8, 128, 128),
    ("Llama-3-8B decode", 64, 1, 32, 8, 128, 128),
    ("SmolLM2 prefill", 1, 2048, 9, 3, 64, 64),
    ("GPT-NeoX-20B prefill, partial", 1, 2048, 64, 64, 96, 24),
]


def eager(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """x [B, S, H, D] rotated as transformers does it: cos, sin [1, S, 1, R]."""
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    half = torch.cat((-rotated[..., rotary_dim // 2 :], rotated[..., : rotary_dim // 2]), -1)
    return torch.cat((rotated * cos + half * sin, rest), -1)


def percentile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(
    functions: dict[str, Callable[[], object]], rounds: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds a call, [rounds] for each function, interleaved; a round takes 5 ms or one call."""
    repeats = {}
    for name, function in functions.items():
        function()
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        repeats[name] = max(1, int(0.005 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            synchronize()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def bench(case: tuple, dtype: torch.dtype, device: str, rounds: int) -> None:
    name, batch, seq, q_heads, k_heads, head_dim, rotary_dim = case
    q = torch.randn(batch, seq, q_heads, head_dim, dtype=dtype, device=device)
    k = torch.randn(batch, seq, k_heads, head_dim, dtype=dtype, device=device)
    inv_freq, _ = rope_ext.frequencies.default(head_dim, rotary_dim=rotary_dim, device=device)
    cos, sin = rope_ext.cos_sin_cache(inv_freq, seq)
    wide_cos = torch.cat((cos, cos), -1)[None, :, None].to(dtype)
    wide_sin = torch.cat((sin, sin), -1)[None, :, None].to(dtype)

    exact = rope_ext.reference.apply_rotary(q.double(), cos.double(), sin.double())
    error = (rope_ext.apply_rotary(q, cos, sin) - exact).abs().max().item()
    allowed = 2.0 * torch.finfo(dtype).eps * exact.abs().max().item()
    if error > allowed:
        raise SystemExit(f"{name}: wrong result, error {error:.3g} above {allowed:.3g}")

    functions: dict[str, Callable[[], object]] = {
        "in place": lambda: torch.ops.rope.apply_rotary_qk_(q, k, cos, sin),
        "floor rmw": lambda: (q.mul_(1), k.mul_(1)),
        "out of place": lambda: torch.ops.rope.apply_rotary_qk(q, k, cos, sin),
        "floor clone": lambda: (q.clone(), k.clone()),
        "eager": lambda: (
            eager(q, wide_cos, wide_sin, rotary_dim),
            eager(k, wide_cos, wide_sin, rotary_dim),
        ),
    }
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        times = measure(functions, rounds, synchronize)
    median = {name: statistics.median(t) for name, t in times.items()}
    row = [f"{name}, B={batch} S={seq}, {str(dtype).removeprefix('torch.')}"]
    for function in functions:
        low, high = percentile(times[function], 0.1), percentile(times[function], 0.9)
        row.append(f"{1e6 * median[function]:.4g} ({1e6 * low:.4g}-{1e6 * high:.4g})")
    row.append(f"{median['in place'] / median['floor rmw']:.2f}")
    row.append(f"{median['out of place'] / median['floor clone']:.2f}")
    row.append(f"{median['eager'] / median['out of place']:.1f}")
    print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rope_ext.__version__}")
    print("\nMicroseconds: median (10th-90th percentile).\n")
    print(
        "| case | in place | rmw | out of place | clone | eager | in place / rmw "
        "| out of place / clone | eager / out of place |"
    )
    print("|---" * 9 + "|")
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            bench(case, dtype, arguments.device, arguments.rounds)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
