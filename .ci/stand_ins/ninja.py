"""Replaces the package ninja if it is not installed: the folder of the program."""

from pathlib import Path

BIN_DIR = str(Path(__file__).parent)
