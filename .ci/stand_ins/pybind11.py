"""Replaces pybind11 if it is not installed: the headers that torch contains."""

from pathlib import Path

import torch


def get_include() -> str:
    return str(Path(torch.__file__).parent / "include")
