"""The machine code of the CUDA kernels. Needs nvcc, no GPU."""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ("80", "90", "120")
SOURCES = "rotation", "rotation_by_angles", "table_grad", "angles", "kv_cache"
SOURCES += "rms_norm", "rms_norm_grad", "append_rows", "quantize", "cached_keys", "qkv"

# The most registers a thread, by "architecture kernel<arguments>": the first that matches counts.
#
# A multiprocessor has 2,048 threads and 65,536 registers, allocated in steps of 8: 40 registers
# keep three quarters of the threads resident (sm_120 has 1,536 threads, and keeps all). A table
# with one angle a channel needs four values a pair, and the gradient four sums: there the bound is
# half. Eight half-split pairs a thread need 48 on sm_80, which keeps five eighths; with 40 the
# kernel would spill. Eight pairs between two orders with four values would spill too, so they have
# 80. Angles computed in float64 by the kernel need 64 too, and their gradient 80 on sm_80: three
# eighths of the threads still exceed the throughput of the float64 units. With a cache, eight
# half-split pairs need more, and eight interleaved ones of a latent 48, from sm_100 on 64.
#
# A normalised row stays in registers until its sums are known: eight channels a thread, their
# factors and rotations, and for gradients as many values of the gradient. So do the heads of q that
# become float8, and the gradient of a packed projection moves v too. Blocks have up to 512 threads:
# one block is resident with up to 128 registers, two with 64.
MOST_REGISTERS = (
    (r"rms_norm_rotary_kernel<(__half|__nv_bfloat16), 4, HalfSplit, false, false>", 64),
    (r"rms_norm_rotary_kernel\b", 96),
    (r"append_row_kernel<(__half|__nv_bfloat16), 4, HalfSplit, false, false, false>", 64),
    (r"append_row_kernel<.*, false, false>", 112),
    (r"append_row_kernel\b", 128),
    (r"rms_norm_rotary_grad_kernel<.*, true>", 128),
    (r"rms_norm_rotary_grad_kernel<double, 1, ", 72),
    (r"rms_norm_rotary_grad_kernel\b", 104),
    (r"quantize_kernel<(__half|__nv_bfloat16), 4, HalfSplit, false>", 64),
    (r"quantize_kernel", 96),
    (r"shift_kernel\b", 64),
    (r"append_kernel<\w+, 8, HalfSplit, KeyValueCache, true, true", 96),
    (r"append_kernel<\w+, 8, HalfSplit, KeyValueCache, true", 80),
    (r"append_kernel<\w+, 8, (HalfSplit|Either), LatentCache", 80),
    (r"(80|90) append_kernel<\w+, 8, Interleaved, LatentCache", 48),
    (r"<\w+, 8, Either", 80),
    (r"80 cos_sin_grad_kernel", 80),
    (r"80 apply_rotary_kernel<\w+, 8, HalfSplit, false>", 48),
    (r" apply_rotary_kernel<.*false>", 40),
    (r"", 64),
)

ORDERS = ("HalfSplit", "Interleaved", "Either", "Any")  # enum Order of fragment.cuh
WRAPPERS = ("Traits", "Fragment")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="no nvcc: there is no CUDA code to look at"),
]


@dataclass
class Kernel:
    """One kernel of one architecture. loops: the instructions of each loop, by backward branch."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int
    opcodes: list[str]
    loops: list[list[str]]

    @property
    def element(self) -> str:
        found = re.search(r"<(double|float|__half|__nv_bfloat16)", self.name)
        return found[1] if found else ""

    @property
    def is_rotation(self) -> bool:
        return re.match("apply_rotary_(qkv_|at_)?kernel", self.name) is not None

    @property
    def makes_angles(self) -> bool:
        return self.name.startswith(("apply_rotary_at_kernel", "shift_kernel", "cos_sin"))

    def uses(self, *opcodes: str) -> bool:
        return any(op.startswith(opcodes) for op in self.opcodes)

    @property
    def writing_loops(self) -> list[list[str]]:
        return [loop for loop in self.loops if any(op.startswith("STG") for op in loop)]


def named(kernels) -> list[tuple[str, str]]:
    return [(k.arch, k.name) for k in kernels]


def tool(name: str) -> str:
    """The program from PyPI (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), or the toolkit's own."""
    folders = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    found = next((str(f / name) for f in folders if (f / name).exists()), shutil.which(name))
    if found is None:
        pytest.fail(f"{name} is missing: pip install -e '.[test]'")
    return found


def run(*command: str) -> str:
    path = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin:{Path(NVCC).parent}"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def demangled(name: str) -> str:
    """The kernel with the arguments of its traits, such as kernel<__half, 8, HalfSplit, true>."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\(anonymous namespace\)::|rope::cuda::", "", text.strip())
    text = re.sub(r"\(Order\)(\d)", lambda order: ORDERS[int(order[1])], text)
    kernel, arguments = re.fullmatch(r".*?(\w+)(<.*>)?\(.*", text).groups()
    words = [word for word in re.findall(r"\w+", arguments or "") if not word.endswith(WRAPPERS)]
    return f"{kernel}<{', '.join(words)}>" if words else kernel


def loops_of(lines: list[tuple[int, str]]) -> list[list[str]]:
    """lines: (address, instruction). A branch to an earlier address closes a loop."""
    loops = []
    for address, instruction in lines:
        branch = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", instruction)
        if branch and (target := int(branch[1], 16)) < address:
            loops.append([text for at, text in lines if target <= at <= address])
    return loops


def kernels_of(cubin: Path, arch: str) -> list[Kernel]:
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        run(tool("cuobjdump"), "-res-usage", str(cubin)),
    )
    code = {}
    for part in run(tool("cuobjdump"), "-sass", str(cubin)).split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", part)
        code[part.split()[0]] = [(int(address, 16), text.strip()) for address, text in lines]
    assert code.keys() == {name for name, *_ in usage}

    def opcodes(lines):
        return [re.sub(r"^@\S+\s+", "", text).split()[0] for text in lines]

    found = []
    for name, *numbers in usage:
        instructions = opcodes(text for _, text in code[name])
        loops = [opcodes(loop) for loop in loops_of(code[name])]
        found.append(Kernel(arch, demangled(name), *map(int, numbers), instructions, loops))
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")

    def compiled(source_and_arch):
        source, arch = source_and_arch
        cubin = folder / f"{source}.{arch}.cubin"
        run(
            NVCC, "-std=c++17", "-O3", "--fmad=false", f"-I{CSRC}", "-cubin", "-arch", f"sm_{arch}",
            "-o", str(cubin), str(CSRC / "cuda" / f"{source}.cu"),
        )  # fmt: skip
        return kernels_of(cubin, arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(chain.from_iterable(pool.map(compiled, product(SOURCES, ARCHS))))


def test_nothing_is_kept_in_local_memory(kernels):
    assert named(k for k in kernels if k.stack or k.local or k.uses("LDL", "STL")) == []


def test_registers_leave_room_for_enough_threads(kernels):
    registers = {f"{k.arch} {k.name}": k.registers for k in kernels}
    assert len(registers) == len(kernels)
    for name, count in registers.items():
        assert count <= next(most for of, most in MOST_REGISTERS if re.search(of, name)), name


def test_channels_move_in_16_byte_instructions(kernels):
    """In every kernel with the widest vectors: N elements are 16 bytes."""
    size = {"double": 8, "float": 4, "__half": 2, "__nv_bfloat16": 2}
    wide = [
        k
        for k in kernels
        if k.is_rotation and int(re.search(r", (\d+),", k.name)[1]) * size[k.element] == 16
    ]
    assert len({k.name for k in wide}) == 41
    appending = [k for k in kernels if k.name.startswith("append_kernel") and ", 1, " not in k.name]
    assert len({k.name for k in appending}) == 27
    for k in wide + appending:
        assert k.uses("LDG.E.128"), (k.arch, k.name)
        assert k.uses("STG.E.128"), (k.arch, k.name)


def test_float64_arithmetic_only_where_the_data_are_float64(kernels):
    """Angles are computed in float64; a rotation of narrower data by a table never uses it."""
    narrow = (k for k in kernels if not k.makes_angles and k.element != "double")
    assert named(k for k in narrow if k.uses("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")) == []


def test_no_fused_multiply_add_in_a_rotation(kernels):
    """The two products and their sum are rounded one by one, as on the CPU (csrc/math/rotation.h).
    Angles have fused ones (csrc/math/angle.h), in a loop that writes no result.
    """
    fused = ("DFMA", "HFMA2.BF16", "FFMA2")
    for k in kernels:
        if k.is_rotation:
            code = chain.from_iterable(k.writing_loops) if k.makes_angles else k.opcodes
            assert not any(op.startswith(fused) for op in code), (k.arch, k.name)


def test_loops_over_heads_divide_nothing(kernels):
    """A division is a reciprocal with correction steps, or a call of a routine for it."""
    dividing = ("MUFU.RCP", "I2F", "CALL", "F2I")
    for k in kernels:
        if k.is_rotation:
            assert k.writing_loops, (k.arch, k.name)
            loops = chain.from_iterable(k.writing_loops)
            assert not any(op.startswith(dividing) for op in loops), (k.arch, k.name)
