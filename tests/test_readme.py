"""The README is short, its commands and numbers are right, and type checkers find the package."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
WRONG = """import rope_ext

inv_freq, scaling = rope_ext.frequencies.yarn("128", factor=4.0)
rope_ext.no_such_function()
"""


def test_length():
    assert TEXT.count("\n") <= 210


@pytest.mark.parametrize("name", ["demo", "test"])
def test_command_is_one_line_of_shell(name: str):
    match = re.search(rf"^<!-- {name} command -->\n```sh\n(.*?)^```$", TEXT, re.S | re.M)
    assert match is not None
    assert match[1].count("\n") == 1
    assert match[1].startswith("pip install ")


def test_numbers_are_those_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "overview.py"]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = re.search(r"<!-- numbers -->\n(.*?)<!-- /numbers -->", TEXT, re.S)[1]
    assert rows.count("\n") == 6
    assert table.endswith(rows)


@pytest.mark.slow
def test_type_checkers_find_an_editable_install(tmp_path: Path):
    """Of a copy without kernels, in an environment that has nothing else."""
    for checker in ("mypy", "pyright"):
        pytest.importorskip(checker)
    tree, venv = tmp_path / "tree", tmp_path / "venv"
    shutil.copytree(ROOT / "rope_ext", tree / "rope_ext", ignore=shutil.ignore_patterns("_C*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "csrc").mkdir()
    (tree / "csrc" / "empty.cpp").touch()
    build = "import setuptools.build_meta as b; b.build_editable('.')"
    environment = {**os.environ, "ROPE_EXT_CUDA": "off"}
    environment.pop("PYTHONPATH", None)  # checkers follow it
    subprocess.run([sys.executable, "-c", build], cwd=tree, env=environment, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    (wheel,) = tree.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)

    script = tmp_path / "user.py"
    script.write_text(WRONG)
    python = venv / "bin" / "python"
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, script]
    pyright = [sys.executable, "-m", "pyright", "--pythonpath", python, script]
    for command in (mypy, pyright):
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        errors = re.findall(r"user\.py:(\d+).*error", result.stdout)
        assert errors == ["3", "4"], result.stdout + result.stderr
