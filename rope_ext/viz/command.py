"""The commands plot and explore."""

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rope_ext.viz import FIGURES
from rope_ext.viz.model_rotation import ModelRotation

NEEDED = ("matplotlib", "mpmath")
MOST_BYTES = 2**24  # of a config.json; those of models have a few thousand


class CannotShow(Exception):
    """There is nothing to show. The message gives the reason and the remedy."""


def plot(args: argparse.Namespace) -> int:
    """Writes the figures. Returns 0, or 2 if it could not run."""
    return status_of("plot", draw, args)


def explore(args: argparse.Namespace) -> int:
    """Writes the page. Returns 0, or 2 if it could not run."""
    return status_of("explore", write_page, args)


def status_of(
    name: str, command: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> int:
    """Runs a command, and prints an error as one line on stderr."""
    try:
        command(args)
    except (CannotShow, OSError, ValueError) as error:
        print(f"rope_ext {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def draw(args: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotShow(f"{', '.join(missing)} not installed: pip install 'rope_ext[viz]'")
    model = read(args)
    from rope_ext.viz import figures

    moving = [kind for kind in ("gif", "mp4") if getattr(args, kind)]
    if "mp4" in moving and shutil.which("ffmpeg") is None:
        raise CannotShow("--mp4: the program ffmpeg not found; --gif needs none")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(args.figures or (() if moving else FIGURES)):
        path = writable(args.out / f"{name}.{args.format}")
        figures.save(getattr(figures, name)(model), path, **dpi_of(args))
        print(path)
    for kind in moving:
        path = writable(args.out / f"rotation.{kind}")
        figures.animate(model, path, **dpi_of(args))
        print(path)


def dpi_of(args: argparse.Namespace) -> dict[str, int]:
    """The keyword dpi, where it is given; each kind of file has its own default."""
    return {} if args.dpi is None else {"dpi": args.dpi}


def write_page(args: argparse.Namespace) -> None:
    from rope_ext.viz.page import page

    writable(args.out).write_text(page(read(args)), encoding="utf-8")
    print(args.out.resolve().as_uri())


def read(args: argparse.Namespace) -> ModelRotation:
    """The rotation of --config and --layer-type, or of a model like Llama 3."""
    if args.config is None:
        return ModelRotation.of()
    return ModelRotation.of(config_of(args.config), args.layer_type)


def config_of(path: Path) -> dict[str, Any]:
    """Reads a config.json, or that in the folder of a model."""
    path = path / "config.json" if path.is_dir() else path
    argument = f"--config {str(path)!r}"
    if not path.exists():
        raise CannotShow(
            f"{argument}: No such file. Nothing is downloaded: give the path of a config.json, or "
            "of a folder that has one"
        )
    if not path.is_file():  # reading a FIFO would wait
        raise CannotShow(f"{argument}: expected a file, got a folder, a FIFO or a device")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise CannotShow(f"{argument}: expected a config.json of at most {MOST_BYTES:,} bytes")
    try:
        config = json.loads(content.decode())
    except RecursionError:
        raise CannotShow(f"{argument}: expected JSON, got brackets nested too deeply") from None
    except ValueError as error:  # also for integers with thousands of digits
        raise CannotShow(f"{argument}: expected JSON, got {error}") from error
    if not isinstance(config, dict):
        raise CannotShow(f"{argument}: expected a dict, got {type(config).__name__}")
    return config


def writable(path: Path) -> Path:
    """The path, unless it can't be a regular file: writing to a FIFO would wait."""
    if path.exists() and not path.is_file():
        raise CannotShow(
            f"--out {str(path)!r}: expected the path of a file, got a folder, a FIFO or a device"
        )
    return path
