"""In place of pybind11, where that is not installed: the headers that torch brings."""

from pathlib import Path

import torch


def get_include() -> str:
    return str(Path(torch.__file__).parent / "include")
