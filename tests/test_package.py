"""The package: build information, required symbols, and import, which loads it or raises."""

import ctypes
import importlib
import importlib.resources
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from elftools.elf.elffile import ELFFile
from support import CPU_CODE

import rope_ext
from rope_ext import _C
from rope_ext.__main__ import main

PACKAGE = Path(rope_ext.__file__).parent
REPOSITORY = Path(__file__).parent.parent

# A name of namespace at, c10, torch or caffe2 anywhere in a mangled C++ name (Itanium C++ ABI,
# 5.1.2): N, qualifiers, then the length and the name of the first namespace.
UNSTABLE = re.compile(r"N[rVK]*[RO]?(?:2at|3c10|5torch|6caffe2)\d")
# The C functions of the LibTorch stable ABI.
STABLE = re.compile(r"(?:aoti_)?torch_\w+")
STABLE_HEADERS = ["stable/c/shim.h", "inductor/aoti_torch/c/shim.h"]
# The newest symbol versions that manylinux_2_28 allows. The static CUDA runtime uses the thread
# functions of the build's libc, whose newest version is 2.34.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
NEWEST_WITH_CUDART = {**NEWEST, "GLIBC": (2, 34)}
# Limit for the import of rope_ext after torch. About half of it on an idle machine.
IMPORT_SECONDS = 0.08
# Bound only if torch has CUDA: libtorch_cuda is not linked.
WEAK = {"aoti_torch_get_current_cuda_stream"}
# Tells why an allocation failed (csrc/host/allocation.cpp): bound if torch has it.
WEAK_WHY = {
    "torch_exception_get_what_without_backtrace",
    "_ZN2at4_ops9new_empty4callERKNS_6TensorEN3c108ArrayRefINS5_6SymIntEEESt8optionalINS5_"
    "10ScalarTypeEES9_INS5_6LayoutEES9_INS5_6DeviceEES9_IbE",
}
LIBRARIES = re.compile(
    r"(libtorch|libtorch_cpu|libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|ld-linux[-\w]*|libcudart)\.so"
)


@pytest.fixture(scope="module")
def elf():
    if sys.platform != "linux":
        pytest.skip("the lists of symbols are those of ELF")
    with open(_C.__file__, "rb") as file:
        yield ELFFile(file)


@pytest.fixture
def capability():
    before = _C.build_info()["cpu_capability"]
    yield before
    _C.set_cpu_capability(before)


def undefined_symbols(elf):
    """Name -> binding (STB_GLOBAL, STB_WEAK) of each symbol that other libraries must define."""
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    undefined = [symbol for symbol in symbols if symbol.name and symbol["st_shndx"] == "SHN_UNDEF"]
    return {symbol.name: symbol["st_info"]["bind"] for symbol in undefined}


def run_python(code, folder, *options, **env):
    """Runs code in a new process, which finds the package even if it is not installed."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def assert_import_fails(result, *parts):
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    for part in parts:
        assert part in message


# ---- symbols


def test_unstable_names_are_recognised():
    for name in (
        "_ZN2at5emptyEv",
        "_ZNK3c1010TensorImpl5sizesEv",
        "_ZTVN5torch8autograd4NodeE",  # a vtable
        "_Z4takeRKN2at6TensorE",  # only in an argument
        "_ZNSt6vectorIN3c106SymIntESaIS1_EED1Ev",  # only in a template argument
    ):
        assert UNSTABLE.search(name), name
    for name in (
        "_ZN4rope3cpu10capabilityEv", "_ZNSt5dequeIbSaIbEED1Ev", "aoti_torch_empty_strided"
    ):  # fmt: skip
        assert not UNSTABLE.search(name), name


def test_no_symbol_outside_the_stable_abi_and_no_kernel_is_missing(elf):
    names = undefined_symbols(elf)
    assert "torch_library_impl" in names  # the list is the right one
    assert {name for name in names if UNSTABLE.search(name)} <= WEAK_WHY
    assert {names[name] for name in WEAK_WHY} == {"STB_WEAK"}
    assert [name for name in names if "4rope" in name] == []
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    declared = "\n".join((include / header).read_text() for header in STABLE_HEADERS)
    declared = set(STABLE.findall(declared))
    used = {name for name in names if STABLE.fullmatch(name)}
    assert used - declared - WEAK - WEAK_WHY == set()


def test_symbols_that_torch_without_cuda_lacks_are_weak(elf):
    libtorch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    bindings = {n: b for n, b in undefined_symbols(elf).items() if STABLE.fullmatch(n)}
    assert {bindings[name] for name in WEAK if name in bindings} <= {"STB_WEAK"}
    weak = WEAK | WEAK_WHY
    assert [n for n in bindings if n not in weak and not hasattr(libtorch_cpu, n)] == []


def test_only_libtorch_and_the_system_are_linked(elf):
    tags = list(elf.get_section_by_name(".dynamic").iter_tags())
    needed = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
    assert "libtorch_cpu.so" in needed
    assert "libtorch.so" in needed  # loads libtorch_cuda, and its stream, if torch has CUDA
    assert [name for name in needed if not LIBRARIES.match(name)] == []
    assert [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")] == []
    shared_cudart = any(name.startswith("libcudart") for name in needed)
    assert shared_cudart == (_C.build_info()["cudart"] == "shared")


def test_systems_of_manylinux_2_28_have_every_symbol(elf):
    newest = NEWEST_WITH_CUDART if _C.build_info()["cudart"] == "static" else NEWEST
    needed = {name: [] for name in newest}
    for _, versions in elf.get_section_by_name(".gnu.version_r").iter_versions():
        for version in versions:
            name, _, number = version.name.rpartition("_")
            if name in newest:  # not of libcudart
                needed[name].append(tuple(map(int, number.split("."))))
    assert needed["GLIBC"]  # the list is the right one
    assert {name: max(n) for name, n in needed.items() if n and max(n) > newest[name]} == {}


def test_replacements_of_library_symbols_are_not_exported(elf):
    """csrc/host/glibc_compatibility.cpp: other libraries must not use its symbols."""
    source = (REPOSITORY / "csrc" / "host" / "glibc_compatibility.cpp").read_text()
    inside = set(re.findall(r'__asm__\(\s*"(\w+)"', source))
    assert len(inside) == 4
    dynamic = elf.get_section_by_name(".dynsym").iter_symbols()
    assert inside & {symbol.name for symbol in dynamic} == set()


# ---- build_info


def test_build_info_says_what_was_built():
    info = _C.build_info()
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)[1]
    assert rope_ext.__version__ == info["version"] == version
    assert info["stable_abi_target"] == "2.10"
    assert info["cpu_capability"] in CPU_CODE
    assert re.match(r"(GCC|Clang|\w+ Clang) \d+", info["compiler"])
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
        assert info["cudart"] in ("static", "shared")
        assert info["cuda_archs"]
        assert all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) for arch in info["cuda_archs"])
        assert info["no_cuda_reason"] is None
    else:
        assert (info["cuda_version"], info["cudart"], info["cuda_archs"]) == (None, None, [])
        assert info["no_cuda_reason"]


# ---- GPU architectures of a build

ALL_ARCHS = ["8.0", "9.0", "10.0+PTX"]  # the architectures of a release that the tests' nvcc knows
BUILDS = [  # GPUs that nvidia-smi prints, environment, architectures
    (["9.0"], {}, ["9.0+PTX"]),
    (["9.0", "8.0", "9.0"], {}, ["8.0", "9.0+PTX"]),
    (["12.1", "8.7"], {}, ["8.6", "10.3+PTX"]),  # between and after nvcc's
    (["6.1"], {}, ALL_ARCHS),  # before all of nvcc's
    (["No devices were found"], {}, ALL_ARCHS),
    ([], {}, ALL_ARCHS),  # no nvidia-smi
    (["9.0"], {"CUDA_VISIBLE_DEVICES": ""}, ALL_ARCHS),
    (["9.0"], {"TORCH_CUDA_ARCH_LIST": "all"}, ALL_ARCHS),
    (["9.0"], {"TORCH_CUDA_ARCH_LIST": "8.0, 8.6+PTX"}, ["8.0", "8.6+PTX"]),
]


def test_a_build_is_for_the_gpus_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(REPOSITORY)
    cuda_archs = runpy.run_path(str(REPOSITORY / "setup.py"))["cuda_archs"]
    nvcc, nvidia_smi = tmp_path / "nvcc", tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    for gpus, environment, archs in BUILDS:
        printed = {nvcc: [f"compute_{arch}" for arch in (80, 86, 90, 100, 103)], nvidia_smi: gpus}
        for program, lines in printed.items():
            program.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines)]))
            program.chmod(0o755)
        if not gpus:
            nvidia_smi.unlink()
        for name in ("CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
            if name in environment:
                monkeypatch.setenv(name, environment[name])
        assert cuda_archs(str(nvcc))[0] == archs, (gpus, environment)


# ---- CPU capability


def test_unknown_capability_is_refused_and_changes_nothing(capability, tmp_path):
    for name in ("", "AVX2", "avx9", "portable "):
        expected = f"expected {' or '.join(map(repr, CPU_CODE))}, got '{name}'"
        with pytest.raises(ValueError, match=expected):
            _C.set_cpu_capability(name)
    assert _C.build_info()["cpu_capability"] == capability
    result = run_python("import rope_ext", tmp_path, ROPE_EXT_CPU_CAPABILITY="avx9")
    assert_import_fails(result, "ROPE_EXT_CPU_CAPABILITY", "'avx9'")


def test_capability_is_the_best_of_the_processor_or_that_of_the_environment(capability, tmp_path):
    code = "import rope_ext; print(rope_ext._C.build_info()['cpu_capability'])"
    best, portable = (
        run_python(code, tmp_path, ROPE_EXT_CPU_CAPABILITY=name).stdout.strip()
        for name in ("", "portable")
    )
    assert portable == "portable"
    in_use = best
    for i, name in enumerate(CPU_CODE):
        if i <= CPU_CODE.index(best):
            _C.set_cpu_capability(in_use := name)
        else:
            with pytest.raises(RuntimeError, match=f"does not support '{name}'"):
                _C.set_cpu_capability(name)
        assert _C.build_info()["cpu_capability"] == in_use


# ---- import


def test_import_takes_little_beside_that_of_torch(tmp_path):
    """Processor time, the least of several tries: the machine may be busy, and the first try may
    have to compile to bytecode, as an installation does.
    """
    code = "import time, torch; before = time.process_time(); import rope_ext; "
    code += "print(time.process_time() - before)"
    results = (run_python(code, tmp_path, PYTHONDONTWRITEBYTECODE="") for _ in range(5))
    tries = (float(result.stdout) for result in results)
    assert any(seconds < IMPORT_SECONDS for seconds in tries)


def test_import_brings_nothing_along(tmp_path):
    """No other package, and no module of PyTorch that PyTorch has not imported."""
    code = "import sys, torch; before = {*sys.modules}; import rope_ext; "
    result = run_python(code + "print(*{*sys.modules} - before)", tmp_path)
    brought = {name for name in result.stdout.split() if name.partition(".")[0] != "rope_ext"}
    assert "rope_ext.rotation" in result.stdout, result.stderr
    assert brought <= sys.stdlib_module_names


FOREIGN = """
import torch
library = torch.library.Library("rope", "{kind}")
library.define("{schema}")
import rope_ext
print(rope_ext.apply_rotary(torch.ones(1, 2, 1, 4), torch.ones(2, 2), torch.zeros(2, 2)).shape)
"""
OTHER = "other(Tensor x) -> Tensor"


def test_import_where_another_library_has_the_names_says_who(tmp_path):
    for kind, schema, is_refused in (
        ("DEF", OTHER, True),
        ("FRAGMENT", "cos_sin(Tensor x) -> ()", True),
        ("FRAGMENT", OTHER, False),
    ):
        (tmp_path / "foreign.py").write_text(FOREIGN.format(kind=kind, schema=schema))
        result = run_python("import foreign", tmp_path)
        if is_refused:
            expected = "another library", "foreign.py:3. A process", "import only one"
            assert_import_fails(result, *expected)
        else:
            assert result.stdout.strip() == "torch.Size([1, 2, 1, 4])", result.stderr


@pytest.mark.slow
def test_import_again_once_the_names_are_free(tmp_path):
    code = FOREIGN.format(kind="DEF", schema=OTHER).replace(
        "import rope_ext",
        "try:\n    import rope_ext\nexcept ImportError:\n    library._destroy()\nimport rope_ext",
    )
    result = run_python(code, tmp_path)
    assert result.stdout.strip() == "torch.Size([1, 2, 1, 4])", result.stderr


# A copy named librope, whose operators are registered by hand.
WITHOUT_PYTHON = """
import importlib.machinery, importlib.util, torch
loader = importlib.machinery.ExtensionFileLoader("_C", {copy!r})
first = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(first)
assert first.register_operators("rope", for_cuda=False)
import rope_ext
"""
AGAIN = """
import sys
import rope_ext
for name in [name for name in sys.modules if name.partition(".")[0] == "rope_ext"]:
    del sys.modules[name]
sys.path.insert(0, {folder!r})
import rope_ext
"""


@pytest.mark.slow
def test_second_library_is_refused_and_names_the_first(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "rope_ext")
    for folder in (PACKAGE.parent, tmp_path):  # the same copy, another copy
        result = run_python(AGAIN.format(folder=str(folder)), PACKAGE.parent)
        assert_import_fails(result, "rope_ext", _C.__file__, "start a new process")
    copy = shutil.copy(_C.__file__, tmp_path / "librope.so")
    result = run_python(WITHOUT_PYTHON.format(copy=str(copy)), PACKAGE.parent)
    assert_import_fails(result, str(copy), "csrc/schema.cpp")


@pytest.mark.slow
def test_package_is_loaded_anew_as_often_as_asked(tmp_path):
    code = """
import importlib, sys, torch
import rope_ext
importlib.reload(importlib.reload(rope_ext))
del sys.modules["rope_ext"]
import rope_ext
x = torch.ones(1, 2, 1, 4, requires_grad=True)
rope_ext.apply_rotary(x, torch.ones(2, 2), torch.zeros(2, 2)).sum().backward()
print(x.grad.sum())
"""
    result = run_python(code, tmp_path)
    assert result.stdout.strip() == "tensor(8.)", result.stderr


def test_package_that_is_not_built_or_meets_another_python_or_torch_says_so(tmp_path):
    path = os.pathsep.join([str(tmp_path), str(Path(torch.__file__).parent.parent)])
    copy = tmp_path / "rope_ext"
    copy.mkdir()
    shutil.copy(PACKAGE / "__init__.py", copy)
    unbuilt = run_python("import rope_ext", tmp_path, "-S", PYTHONPATH=path)  # -S: none installed
    assert_import_fails(unbuilt, "rope_ext is not built", "pip install -e .")
    (copy / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    result = run_python("import rope_ext", tmp_path, "-S", PYTHONPATH=path)
    assert_import_fails(result, "another Python", "cpython-27", sys.implementation.cache_tag)
    (tmp_path / "torch.py").write_text('__version__ = "2.9.1+cpu"\n')
    result = run_python("import rope_ext", tmp_path)
    assert_import_fails(result, "torch >= 2.10", "2.9.1+cpu")


def test_dir_shows_the_public_names_alone():
    shown = {name for name in dir(rope_ext) if not name.startswith("__")}
    assert shown == {*rope_ext.__all__}
    assert "__version__" in dir(rope_ext)
    assert importlib.import_module("rope_ext.rotation") is rope_ext.rotation
    assert importlib.resources.files("rope_ext").joinpath("py.typed").is_file()


# ---- command line


WRONG_ARGUMENTS = [
    (["spiral"], "invalid choice: 'spiral'"),
    (["explore", "--spiral"], "unrecognized arguments: --spiral"),
    (["plot", "--format", "a\nb"], "invalid choice"),
    (["demo", "--factor", "1e300"], "expected a number of at least 1 and at most 2147483647"),
    (["demo", "--original", "9" * 5000], "expected an integer of at least 1 and at most 21474"),
    (["demo", "--tokens", "1.5"], "expected an integer of at least 1 .* got '1.5'"),
]


def test_wrong_arguments_end_with_status_2_and_one_line_and_version_with_0(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"rope_ext {rope_ext.__version__}\n"
    for arguments, message in WRONG_ARGUMENTS:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
        assert len(error) < 500
