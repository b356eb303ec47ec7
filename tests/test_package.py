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
IMPORT_SECONDS = 0.05
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
    env = {"PYTHONPATH": str(PACKAGE.parent), **env}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def expect_import_error(result, *parts):
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    for part in parts:
        assert part in message


# ------------------------------------------------------------------------------------- symbols


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


def test_no_symbol_outside_the_stable_abi(elf):
    names = undefined_symbols(elf)
    assert "torch_library_impl" in names  # the list is the right one
    assert {name for name in names if UNSTABLE.search(name)} <= WEAK_WHY
    assert {names[name] for name in WEAK_WHY} == {"STB_WEAK"}


def test_no_kernel_is_missing(elf):
    assert [name for name in undefined_symbols(elf) if "4rope" in name] == []


def test_torch_symbols_are_declared_by_the_stable_abi(elf):
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    declared = "\n".join((include / header).read_text() for header in STABLE_HEADERS)
    declared = set(STABLE.findall(declared))
    used = {name for name in undefined_symbols(elf) if STABLE.fullmatch(name)}
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


# ---------------------------------------------------------------------------------- build_info


def test_version_is_that_of_the_project_file():
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)[1]
    assert rope_ext.__version__ == _C.build_info()["version"] == version


def test_build_info_says_what_was_built():
    info = _C.build_info()
    assert info["stable_abi_target"] == "2.10"
    assert info["cpu_capability"] in ("portable", "avx2")
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


# --------------------------------------------------------------------- GPU architectures of a build

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
    monkeypatch.chdir(tmp_path)
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


# ------------------------------------------------------------------------------ CPU capability


def test_unknown_capability_is_refused_and_changes_nothing(capability):
    for name in ("", "AVX2", "avx512", "portable "):
        with pytest.raises(ValueError, match=f"expected 'portable' or 'avx2', got '{name}'"):
            _C.set_cpu_capability(name)
    assert _C.build_info()["cpu_capability"] == capability


def test_capability_is_the_best_of_the_processor_or_that_of_the_environment(capability, tmp_path):
    code = "import rope_ext; print(rope_ext._C.build_info()['cpu_capability'])"
    best, portable = (
        run_python(code, tmp_path, ROPE_EXT_CPU_CAPABILITY=name).stdout.strip()
        for name in ("", "portable")
    )
    assert portable == "portable"
    _C.set_cpu_capability("portable")
    assert _C.build_info()["cpu_capability"] == "portable"
    if best == "avx2":
        _C.set_cpu_capability("avx2")
    else:
        with pytest.raises(RuntimeError, match="does not support 'avx2'"):
            _C.set_cpu_capability("avx2")
    assert _C.build_info()["cpu_capability"] == best


def test_unknown_capability_in_the_environment_fails_at_import(tmp_path):
    result = run_python("import rope_ext", tmp_path, ROPE_EXT_CPU_CAPABILITY="avx9")
    expect_import_error(result, "ROPE_EXT_CPU_CAPABILITY", "'avx9'")


# --------------------------------------------------------------------------------------- import


def test_import_from_another_folder(tmp_path):
    result = run_python("import rope_ext; print(rope_ext.__file__)", tmp_path, PYTHONPATH="")
    assert result.stdout.strip() == rope_ext.__file__, result.stderr


def test_import_takes_little_beside_that_of_torch(tmp_path):
    """Processor time, the least of several tries: the machine may be busy, and the first try may
    have to compile to bytecode, as an installation does.
    """
    code = """
import time, torch
before = time.process_time()
import rope_ext
print(time.process_time() - before)
"""
    results = (run_python(code, tmp_path, PYTHONDONTWRITEBYTECODE="") for _ in range(5))
    tries = (float(result.stdout) for result in results)
    assert any(seconds < IMPORT_SECONDS for seconds in tries)


def test_import_brings_nothing_along(tmp_path):
    """No other package, and no module of PyTorch that PyTorch has not imported."""
    code = """
import sys, torch
before = {*sys.modules}
import rope_ext
print(*{*sys.modules} - before)
"""
    result = run_python(code, tmp_path)
    brought = {name for name in result.stdout.split() if name.partition(".")[0] != "rope_ext"}
    assert "rope_ext.rotation" in result.stdout, result.stderr
    assert brought <= sys.stdlib_module_names


FOREIGN = """
import torch

library = torch.library.Library("rope", "{kind}")
if "{schema}":
    library.define("{schema}")
import rope_ext
x = torch.ones(1, 2, 1, 4)
print(rope_ext.apply_rotary(x, torch.ones(2, 2), torch.zeros(2, 2)).shape)
"""


@pytest.mark.parametrize(
    ("kind", "schema"),
    [("DEF", "other(Tensor x) -> Tensor"), ("FRAGMENT", "cos_sin(Tensor x) -> ()")],
    ids=["namespace", "one name"],
)
def test_import_where_another_library_has_the_names_says_who(kind, schema, tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN.format(kind=kind, schema=schema))
    result = run_python("import foreign", tmp_path)
    expect_import_error(result, "another library", "foreign.py:4. A process", "import only one")


@pytest.mark.slow
def test_import_beside_another_library_of_other_names_works(tmp_path):
    code = FOREIGN.format(kind="FRAGMENT", schema="other(Tensor x) -> Tensor")
    result = run_python(code + "print(torch.ops.rope.other)", tmp_path)
    assert result.stdout.split()[-1] == "rope.other", result.stderr


@pytest.mark.slow
def test_import_again_once_the_names_are_free(tmp_path):
    code = """
import torch

library = torch.library.Library("rope", "DEF")
try:
    import rope_ext
except ImportError:
    library._destroy()
import rope_ext
print(rope_ext.apply_rotary(torch.ones(1, 2, 1, 4), torch.ones(2, 2), torch.zeros(2, 2)).shape)
"""
    result = run_python(code, tmp_path)
    assert "torch.Size([1, 2, 1, 4])" in result.stdout, result.stderr


REMOVE = """
import sys
import rope_ext

for name in [name for name in sys.modules if name.partition(".")[0] == "rope_ext"]:
    del sys.modules[name]
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["the same copy", "another copy"])
def test_second_import_is_refused_and_names_the_first(own, tmp_path):
    if not own:
        shutil.copytree(PACKAGE, tmp_path / "rope_ext")
    folder = PACKAGE.parent if own else tmp_path
    code = f"{REMOVE}\nsys.path.insert(0, {str(folder)!r})\nimport rope_ext"
    result = run_python(code, PACKAGE.parent)
    expect_import_error(result, "rope_ext", _C.__file__, "start a new process")


@pytest.mark.slow
def test_library_without_python_that_came_first_is_named(tmp_path):
    """A copy named librope, whose operators are registered by hand."""
    copy = tmp_path / "librope.so"
    shutil.copy(_C.__file__, copy)
    code = f"""
import importlib.machinery, importlib.util, sys, torch

loader = importlib.machinery.ExtensionFileLoader("_C", {str(copy)!r})
first = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(first)
assert first.register_operators()
import rope_ext
"""
    expect_import_error(run_python(code, tmp_path), str(copy), "csrc/schema.cpp")


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


def test_types_are_shipped():
    assert importlib.resources.files("rope_ext").joinpath("py.typed").is_file()


def run_copy_without_compiled_part(tmp_path, *names):
    """Imports a copy of the package with empty files of these names; -S: nothing is installed."""
    (tmp_path / "rope_ext").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "rope_ext")
    for name in names:
        (tmp_path / "rope_ext" / name).touch()
    path = os.pathsep.join([str(tmp_path), str(Path(torch.__file__).parent.parent)])
    return run_python("import rope_ext", tmp_path, "-S", PYTHONPATH=path)


def test_unbuilt_package_says_how_to_build(tmp_path):
    result = run_copy_without_compiled_part(tmp_path)
    expect_import_error(result, "rope_ext is not built", "pip install -e .")


def test_build_for_another_python_says_so(tmp_path):
    result = run_copy_without_compiled_part(tmp_path, "_C.cpython-27-x86_64-linux-gnu.so")
    expect_import_error(result, "another Python", "cpython-27", sys.implementation.cache_tag)


def test_old_torch_is_refused_by_name(tmp_path):
    (tmp_path / "torch.py").write_text('__version__ = "2.9.1+cpu"\n')
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    result = run_python("import rope_ext", tmp_path, PYTHONPATH=path)
    expect_import_error(result, "torch >= 2.10", "2.9.1+cpu")


def test_dir_shows_the_public_names_alone():
    shown = {name for name in dir(rope_ext) if not name.startswith("__")}
    assert shown == {*rope_ext.__all__}
    assert "__version__" in dir(rope_ext)
    assert importlib.import_module("rope_ext.rotation") is rope_ext.rotation


# ------------------------------------------------------------------------------ command line


def test_help_and_version_are_shown(capsys):
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert all(name in shown.out for name in ("demo", "plot", "explore", "info", "integrations"))
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"rope_ext {rope_ext.__version__}\n"


WRONG_ARGUMENTS = [
    (["spiral"], "invalid choice: 'spiral'"),
    (["explore", "--spiral"], "unrecognized arguments: --spiral"),
    (["plot", "--format", "a\nb"], "invalid choice"),
    (["demo", "--factor", "1e300"], "expected a number of at least 1 and at most 2147483647"),
    (["demo", "--original", "9" * 5000], "expected an integer of at least 1 and at most 21474"),
    (["demo", "--tokens", "1.5"], "expected an integer of at least 1 .* got '1.5'"),
]


def test_wrong_arguments_end_with_status_2_and_one_line(capsys):
    for arguments, message in WRONG_ARGUMENTS:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
        assert len(error) < 500
