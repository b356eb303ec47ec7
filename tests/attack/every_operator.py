"""Every operator of torch.ops.rope on a CUDA device, with small arguments drawn from seeds, for
compute-sanitizer and for an emulator of the CUDA runtime.

    python tests/attack/every_operator.py [CALLS]     # of each operator

Fails if an operator has no call in calls.py. Under the emulator, which records launches, it also
fails if a kernel of csrc/ was not launched.
"""

import contextlib
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from calls import CALLS, call_operator, registered
from random_arguments import MANY, Arguments, Draw

import rope_ext  # noqa: F401

try:
    import fakegpu_torch
except ImportError:
    fakegpu_torch = None


def small(arguments: Arguments) -> bool:
    return all(x.numel() < MANY for x in arguments.values() if isinstance(x, torch.Tensor))


def call_once(name: str, seed: int) -> bool:
    """Whether it was called."""
    arguments = CALLS[name](Draw(f"{name} {seed}"))
    if not small(arguments):
        return False
    arguments = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    try:
        call_operator(name, arguments)
    except RuntimeError as error:
        # The operator launches a kernel of torch's own; the emulator has none of these.
        if fakegpu_torch is None or "at::native" not in str(error):
            raise
        return False
    torch.cuda.synchronize()
    return True


def not_launched() -> set[str]:
    """The kernels of the sources that no call has launched, in any of their instances."""
    csrc = Path(__file__).parents[2] / "csrc"
    text = "".join(file.read_text() for file in sorted(csrc.rglob("*.cu*")))
    kernels = set(re.findall(r"__global__[^{]*?\s(\w+)\(const", text))
    assert kernels
    launched = fakegpu_torch.stats()["kernels"]
    return {k for k in kernels if not any(re.search(rf"::{k}[<(]", form) for form in launched)}


def main() -> None:
    count = int(sys.argv[1]) if sys.argv[1:] else 30
    if missing := registered() - set(CALLS):
        raise SystemExit(f"no call in calls.py: {', '.join(sorted(missing))}")
    with fakegpu_torch.cpu_fallback() if fakegpu_torch else contextlib.nullcontext():
        for name in sorted(registered()):
            called = sum(call_once(name, seed) for seed in range(count))
            print(f"{name}: {called} calls", flush=True)
    if fakegpu_torch and (kernels := not_launched()):
        raise SystemExit(f"no call launches: {', '.join(sorted(kernels))}")


if __name__ == "__main__":
    main()
