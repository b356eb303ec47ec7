"""Builds rope_ext._C from csrc/**/*.cpp and, for CUDA, csrc/cuda/*.cu.

Knobs (environment variables):

| knob                 | values         | default | meaning                                        |
|----------------------|----------------|---------|------------------------------------------------|
| ROPE_EXT_CUDA        | auto, on, off  | auto    | CUDA kernels; auto: if nvcc works; on: or fail |
| TORCH_CUDA_ARCH_LIST | 8.0 9.0+PTX    | see (1) | GPU architectures, with space, , or ; between; |
|                      | all            |         | or those that a release is built for (2)       |
| ROPE_EXT_CUDART      | static, shared | static  | how the CUDA runtime is linked                 |
| ROPE_EXT_WERROR      | 0, 1           | 0       | 1: compiler warnings are errors                |
| MAX_JOBS             | 1, 2, ...      | cores   | files compiled at the same time                |
| DEBUG                | 0, 1           | 0       | 1: -O0 -g; print each kernel's registers       |

(1) The GPUs that nvidia-smi finds on this machine, and PTX of the newest, like torch's own
extensions. Without a GPU, or with CUDA_VISIBLE_DEVICES="" or -1: all.
(2) 7.5 8.0 9.0 10.0 12.0+PTX, if nvcc knows them: 8.6 and 8.9 run the code for 8.0.

nvcc is searched in CUDA_HOME (or CUDA_PATH), in PATH, and in /usr/local/cuda. The installed torch
may be any release, with or without CUDA: the kernels include none of its headers, and everything
else uses only its stable ABI, so one build serves every torch >= 2.10.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import LinkError

try:
    import ninja
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension
except ImportError as error:
    raise SystemExit(
        f"rope_ext: building needs torch, pybind11 and ninja ({error}). "
        "Leave out --no-build-isolation, or install them first."
    ) from None

# The oldest torch that the binary runs on: 2.10, one byte for each part of the version.
TORCH_TARGET_VERSION = "0x020a000000000000"
CXX_STANDARD = "-std=c++17"

ALL_ARCHS = ["7.5", "8.0", "9.0", "10.0", "12.0"]  # those that nvcc knows, + PTX
OLDEST_CUDA = (12, 0)

CSRC = Path("csrc")

for folder in filter(os.path.exists, (".", "build", "rope_ext.egg-info")):
    if not os.access(folder, os.W_OK):
        raise SystemExit(f"rope_ext: can't write to {os.path.abspath(folder)}: build in a copy")


# ---------------------------------------------------------------------------------------- knobs


def knob(name: str, *allowed: str) -> str:
    """The value of a knob; the first allowed one is the default."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        raise SystemExit(f"rope_ext: expected {name} to be {' or '.join(allowed)}, got {value!r}")
    return value


def max_jobs() -> int | None:
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isdecimal() and int(value) > 0):
        raise SystemExit(f"rope_ext: expected MAX_JOBS to be a positive number, got {value!r}")
    return int(value) if value else None


# ---------------------------------------------------------------------------------------- CUDA


class Missing(Exception):
    """Something that a build needs, such as nvcc, was not found."""


@dataclass
class Cuda:
    nvcc: str
    version: str  # "13.0"
    archs: list[str]  # "9.0", "12.0+PTX"
    archs_reason: str  # why these
    cudart: str  # static, shared
    library_dirs: list[str]


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        raise Missing(f"{command[0]} does not work: {output.strip()}")
    return output


def find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if nvcc := shutil.which(f"{home}/bin/nvcc"):
                return nvcc
            raise Missing(f"{variable}={home} has no bin/nvcc")
    if nvcc := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"):
        return nvcc
    raise Missing("nvcc was not found when rope_ext was built")


def by_number(arch: str) -> tuple[int, ...]:
    return tuple(map(int, arch.split(".")))


def gpus_of_this_machine() -> list[str]:
    """Compute capabilities such as "9.0", from nvidia-smi, as torch would initialise CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\s*(\d+\.\d+)\s*$", result.stdout, re.MULTILINE)


def cuda_archs(nvcc: str) -> tuple[list[str], str]:
    """GPU architectures to build for, and the reason. Ends the build for unknown ones."""
    known = re.findall(r"compute_(\d+)(\d)\b", output_of(nvcc, "--list-gpu-arch"))
    known = [f"{major}.{minor}" for major, minor in known]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ,;")
    if listed not in ("", "all"):
        archs = re.split(r"[\s,;]+", listed)
        for arch in archs:
            match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
            if not match or match[1] not in known:
                raise SystemExit(
                    "rope_ext: expected TORCH_CUDA_ARCH_LIST to be all, or architectures such as "
                    f"'9.0' or '9.0+PTX' among those of {nvcc} ({' '.join(known)}), got {arch!r}"
                )
        return archs, "TORCH_CUDA_ARCH_LIST"

    # A GPU newer than nvcc runs the PTX of an older one.
    gpus = [] if listed else gpus_of_this_machine()
    older = [[arch for arch in known if by_number(arch) <= by_number(gpu)] for gpu in gpus]
    archs = sorted({max(each, key=by_number) for each in older if each}, key=by_number)
    reason = "the GPUs of this machine"
    if not archs:
        archs = [arch for arch in ALL_ARCHS if arch in known]
        reason = "TORCH_CUDA_ARCH_LIST=all" if listed else "no GPU found"
    if not archs:
        raise SystemExit(f"rope_ext: {nvcc} knows none of {' '.join(ALL_ARCHS)}")
    archs[-1] += "+PTX"
    return archs, reason


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if arch.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_cuda(cudart: str) -> Cuda:
    """A CUDA toolkit that can build and link; raises Missing with the reason otherwise."""
    nvcc = find_nvcc()
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if release is None:
        raise Missing(f"{nvcc} --version names no release")
    if tuple(map(int, release.groups())) < OLDEST_CUDA:
        raise Missing(f"{nvcc} is CUDA {release[1]}.{release[2]}, older than 12.0")
    archs, reason = cuda_archs(nvcc)

    # Compile a file: this tests the headers, the host compiler and the runtime library.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_bf16.h>\n__global__ void probe() {}\n")
        command = [nvcc, CXX_STANDARD, *gencode(archs[0]), "-Xcompiler=-fPIC", "-shared"]
        command += [f"-cudart={cudart}", str(source), "-o", f"{folder}/probe.so"]
        output_of(*command)
        plan = output_of(*command, "--dryrun")
    searched = re.findall(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    folders = [flag.removeprefix("-L") for line in searched for flag in shlex.split(line)]
    library = "libcudart_static.a" if cudart == "static" else "libcudart.so"
    library_dirs = [folder for folder in folders if Path(folder, library).exists()]
    return Cuda(nvcc, f"{release[1]}.{release[2]}", archs, reason, cudart, library_dirs)


# --------------------------------------------------------------------------------------- build


class BuildRope(BuildExtension):
    """torch's BuildExtension, which runs nvcc itself.

    torch requires a toolkit of the CUDA version that torch was built with; this class does not.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        # One folder for pip, editable installs and setup.py: unchanged files are not rebuilt.
        self.build_temp = str(Path("build", f"temp-{sys.implementation.cache_tag}"))

    def build_extensions(self) -> None:
        self.debug_build = knob("DEBUG", "0", "1") == "1"
        self.werror = knob("ROPE_EXT_WERROR", "0", "1") == "1"
        self.jobs = max_jobs()
        self.require_compiler()
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR  # also when its environment isn't active
        cuda = self.decide_cuda()

        (extension,) = self.extensions
        torch_dir = Path(torch.__file__).parent
        extension.extra_compile_args = [
            *self.compile_flags(cuda),
            f"-I{CSRC.absolute()}",
            f"-isystem{pybind11.get_include()}",
            f"-isystem{torch_dir / 'include'}",
        ]
        extension.extra_link_args = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
        if sys.platform != "darwin":
            # libtorch has no code of its own, but loads libtorch_cuda if torch has it: there is the
            # stream symbol that csrc/host/device.h declares weak.
            extension.extra_link_args += ["-Wl,--no-as-needed,-ltorch,--as-needed"]
        if cuda:
            extension.extra_objects = self.compile_cuda(cuda)
            extension.extra_link_args += [f"-L{folder}" for folder in cuda.library_dirs]
            if cuda.cudart == "shared":
                extension.extra_link_args += ["-lcudart"]
            else:
                extension.extra_link_args += ["-Wl,--exclude-libs,libcudart_static.a"]
                extension.extra_link_args += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        super().build_extensions()

    def require_compiler(self) -> None:
        """Ends the build with what to install, unless C++17 with Python's headers can be built."""
        compiler = os.environ.get("CXX", "c++")  # as torch chooses it
        probe = [CXX_STANDARD, "-fPIC", *(f"-I{folder}" for folder in self.include_dirs)]
        probe += ["-include", "string_view", "-include", "Python.h", "-xc++", "-c", "/dev/null"]
        with tempfile.TemporaryDirectory() as folder:
            try:
                output_of(*shlex.split(compiler), *probe, "-o", f"{folder}/o")
                self.compiler.link_shared_object([f"{folder}/o"], f"{folder}/so", target_lang="c++")
            except (Missing, OSError, LinkError) as error:
                packages = "g++ and python3-dev"
                if sys.platform == "darwin":
                    packages = "Apple's compiler (xcode-select --install)"
                raise SystemExit(
                    f"rope_ext: {compiler} can't build C++17 with Python.h: install {packages}, "
                    f"or name a compiler in CXX ({str(error).splitlines()[0]})"
                ) from None

    def decide_cuda(self) -> Cuda | None:
        """The CUDA toolkit, or None. Prints the reason, which the binary keeps too."""
        wanted = knob("ROPE_EXT_CUDA", "auto", "on", "off")
        cudart = knob("ROPE_EXT_CUDART", "static", "shared")
        self.no_cuda_reason = ""
        try:
            if wanted == "off":
                raise Missing("ROPE_EXT_CUDA=off when rope_ext was built")
            cuda = find_cuda(cudart)
        except Missing as reason:
            if wanted == "on":
                raise SystemExit(f"rope_ext: ROPE_EXT_CUDA=on, but {reason}") from None
            print(f"rope_ext: building without CUDA kernels: {reason}", flush=True)
            self.no_cuda_reason = str(reason).partition("\n")[0]
            return None
        print(
            f"rope_ext: building CUDA kernels with {cuda.nvcc} (CUDA {cuda.version}) "
            f"for {' '.join(cuda.archs)} ({cuda.archs_reason}), cudart {cuda.cudart}",
            flush=True,
        )
        return cuda

    def compile_flags(self, cuda: Cuda | None) -> list[str]:
        macros = {"TORCH_TARGET_VERSION": TORCH_TARGET_VERSION}
        macros["ROPE_EXT_VERSION"] = quoted(self.distribution.get_version())
        macros["ROPE_EXT_NO_CUDA_REASON"] = quoted(self.no_cuda_reason)
        if cuda:
            macros["ROPE_EXT_CUDA"] = "1"
            macros["ROPE_EXT_CUDA_VERSION"] = quoted(cuda.version)
            macros["ROPE_EXT_CUDA_ARCHS"] = quoted(" ".join(cuda.archs))
            macros["ROPE_EXT_CUDART"] = quoted(cuda.cudart)
        flags = [CXX_STANDARD, "-fvisibility=hidden", *self.host_flags()]
        flags += ["-O0", "-g", "-UNDEBUG"] if self.debug_build else ["-O3", "-g0"]
        return flags + [f"-D{name}={value}" for name, value in macros.items()]

    def host_flags(self) -> list[str]:
        # No contraction: two products and a sum must round as they do in PyTorch (rotation.h).
        # No traps: else GCC makes no vectors of loops whose operations might raise one.
        # psabi: a note that the ABI of vectors depends on the target; no vector crosses a library.
        # The prefix map: __FILE__ in messages is csrc/..., not the folder of the build.
        flags = ["-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]
        flags += [f"-fmacro-prefix-map={os.getcwd()}/="]
        flags += [f"-fmacro-prefix-map={Path(torch.__file__).parent / 'include'}/="]
        flags += [f"-fmacro-prefix-map={pybind11.get_include()}/="]
        return [*flags, "-Werror"] if self.werror else flags

    def compile_cuda(self, cuda: Cuda) -> list[str]:
        """Compiles the changed files of csrc/cuda/*.cu with ninja; returns the objects."""
        flags = [CXX_STANDARD, "--fmad=false", f"-I{CSRC.absolute()}"]
        flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        host = ["-fPIC", "-fvisibility=hidden", *self.host_flags()]
        flags += [f"-Xcompiler={','.join(host)}"]
        flags += ["-Werror=all-warnings"] if self.werror else []
        flags += ["-O1", "-g", "-lineinfo", "-Xptxas=-v"] if self.debug_build else ["-O3"]
        for arch in cuda.archs:
            flags += gencode(arch)
        # nvcc reads these itself. They are in the command, so that changing them rebuilds.
        own = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
        env = [f"{name}={os.environ[name]}" for name in own if os.environ.get(name)]
        command = shlex.join(["env", *env, cuda.nvcc, *flags]).replace("$", "$$")

        folder = Path(self.build_temp, "cuda").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["rule nvcc", f"  command = {command} -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        objects = []
        for source in sorted(CSRC.glob("cuda/*.cu")):
            objects.append(str(folder / f"{source.stem}.o"))
            lines.append(f"build {ninja_path(objects[-1])}: nvcc {ninja_path(source.absolute())}")
        Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", str(self.jobs)] if self.jobs else []
        subprocess.run(["ninja", "-v", "-C", folder, *jobs], check=True)
        return objects


# ------------------------------------------------------------------------------- page on PyPI


def of_project(name: str) -> str:
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.*?)"', text, re.MULTILINE)[1]


def project_urls() -> dict[str, str]:
    """None while the address of the repository is unknown."""
    address = of_project("repository")
    pages = {"Source": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
    return {name: address + page for name, page in pages.items()} if address else {}


def readme() -> str:
    """README.md as the page on PyPI needs it: with absolute links to the files of this version."""
    text = Path("README.md").read_text(encoding="utf-8")
    address, tag = of_project("repository"), f"v{of_project('version')}"
    if not address:
        return text
    workflow = f"{address}/actions/workflows/tests.yml"
    badge = f"[![tests]({workflow}/badge.svg)]({workflow})"
    text = re.sub(r'(!\[[^\]]*\]\(|src=")(?!https?:)', rf"\g<1>{address}/raw/{tag}/", text)
    text = re.sub(r"(\]\()(?!https?:|#)", rf"\g<1>{address}/blob/{tag}/", text)
    return re.sub(r"\A(# .*\n)", rf"\g<1>\n{badge}\n", text)


def quoted(text: str) -> str:
    """A C string literal that is safe on a compiler's command line."""
    return '"' + re.sub(r"[^\w .,:;=+/()'-]", "?", text, flags=re.ASCII) + '"'


def ninja_path(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=project_urls(),
    ext_modules=[
        Extension(
            "rope_ext._C",
            sources=sorted(str(p) for p in CSRC.rglob("*.cpp") if p.name != "librope.cpp"),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildRope},
    # A path that type checkers can follow: they can't run the import hook of the default mode.
    options={"editable_wheel": {"mode": "compat"}},
)
