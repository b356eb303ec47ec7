"""The floors: the time to move the bytes, or to call an operator that does nothing.

floors.cpp is compiled with the C++ compiler ($CXX, else g++ or c++) if it has changed, into
build-benchmarks/ or, if that is not writable, into a temporary folder.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("floors.cpp")
BUILD = Path(__file__).parents[1] / "build-benchmarks"
TORCH_TARGET_VERSION = "0x020a000000000000"  # as in setup.py


def load() -> ModuleType:
    """torch.ops.rope_floors. Builds floors.cpp if needed."""
    try:
        torch.ops.rope_floors.rmw_qk_  # noqa: B018
    except AttributeError:
        torch.ops.load_library(str(library()))
    return torch.ops.rope_floors


def library() -> Path:
    """The shared library, compiled for this source, torch and machine."""
    command = compile_command()
    key = hashlib.sha256(f"{command} {torch.__version__}".encode() + SOURCE.read_bytes())
    folder = BUILD if os.access(BUILD.parent, os.W_OK) else Path(tempfile.gettempdir())
    folder.mkdir(exist_ok=True)
    path = folder / f"floors-{key.hexdigest()[:16]}.so"
    if not path.exists():
        handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        subprocess.run([*command, "-o", partial], check=True)
        os.replace(partial, path)  # atomic: another process may do the same
    return path


def compile_command() -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise SystemExit("benchmarks: floors.cpp needs a C++ compiler: none in $CXX, no g++")
    wide = ["-mavx2"] if platform.machine() in ("x86_64", "AMD64") else []
    return [
        compiler,
        *("-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", *wide),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        *(f"-I{path}" for path in include_paths()),
        str(SOURCE),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-lc10",
    ]
