"""In place of the package ninja, where that is not installed: the folder of the program."""

from pathlib import Path

BIN_DIR = str(Path(__file__).parent)
