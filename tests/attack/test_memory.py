"""Every operator on tensors that border on inaccessible pages: no byte outside of a tensor is read
or written, and the results are right to the last bit.
"""

import numbered_cases
import torch
from calls import CALLS, RECORDS, call_operator, described
from expected_results import expected_results
from guarded_pages import PAGE, Arena, placed
from random_arguments import Arguments, Draw
from support import assert_same_bits

from rope_ext import _C

PATHS = ("avx2", "portable") if "avx2" in _C.build_info()["cpu_capability"] else ("portable",)
NAMES = list(CALLS)
ARENA = Arena()


def test_no_byte_outside_of_a_tensor_is_touched():
    numbered_cases.run_in_a_process(__file__, 640)


def run_case(number, note):
    name = NAMES[number % len(NAMES)]
    path = PATHS[number // len(NAMES) % len(PATHS)]
    d = Draw(f"memory {number}")
    call = CALLS[name](d)
    if any(isinstance(t, torch.Tensor) and max(t.shape, default=0) > 2**20 for t in call.values()):
        return
    elements = max((t.numel() for t in call.values() if isinstance(t, torch.Tensor)), default=0)
    torch.set_num_threads(2 if elements > 2**15 else 1)
    ARENA.reset()
    outputs = written_by(name, call)
    for argument, t in call.items():
        if isinstance(t, torch.Tensor):
            call[argument] = placed(ARENA, d, t, argument, is_written=argument in outputs)
    begins = {n: t.data_ptr() % PAGE for n, t in call.items() if isinstance(t, torch.Tensor)}
    note(f"{name}; {path}, {described(call)}, at {begins}")

    whole = [pages.bytes for _, pages in ARENA.taken]
    before = [t.clone() for t in whole]
    inputs = contiguous(call)
    expected = expected_results(name, inputs)
    _C.set_cpu_capability(path)
    results = results_of(name, call)
    for want, got, argument in zip(expected, results, outputs or "0123", strict=False):
        want.check(got, argument)
    ordinary = contiguous(inputs)
    _C.set_cpu_capability("portable")  # all paths have the same bits
    for got, same in zip(results, results_of(name, ordinary), strict=True):
        assert_same_bits(got, same)
    for argument in outputs:
        call[argument].copy_(inputs[argument])
    for now, then in zip(whole, before, strict=True):
        assert torch.equal(now, then), f"bytes {(now != then).nonzero().flatten().tolist()[:9]}"


def contiguous(call: Arguments) -> Arguments:
    """Copies of the tensors in ordinary memory."""
    layout = torch.contiguous_format
    return {name: t.clone(memory_format=layout) if isinstance(t, torch.Tensor) else t
            for name, t in call.items()}  # fmt: skip


def written_by(name: str, call: Arguments) -> list[str]:
    return [argument for argument in RECORDS[name].written if call.get(argument) is not None]


def results_of(name: str, call: Arguments) -> list[torch.Tensor]:
    result = call_operator(name, call)
    if RECORDS[name].written:
        return [call[argument] for argument in written_by(name, call)]
    return [result] if isinstance(result, torch.Tensor) else list(result)


if __name__ == "__main__":
    numbered_cases.main(__file__, run_case)
