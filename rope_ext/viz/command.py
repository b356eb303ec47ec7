"""The commands plot and explore."""

import argparse
import importlib.util
import json
import sys

from rope_ext.viz import FIGURES
from rope_ext.viz.rope import Rope

NEEDED = ("matplotlib", "mpmath")


class CannotShow(Exception):
    """There is nothing to show; the message says why and what to do."""


def plot(args: argparse.Namespace) -> int:
    """Writes the figures that were asked for. Returns 0, or 2 if it could not run."""
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise CannotShow(f"{', '.join(missing)} not installed: pip install 'rope_ext[viz]'")
        rope = read(args)
        from rope_ext.viz import figures

        args.out.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(args.figures or FIGURES):
            path = args.out / f"{name}.{args.format}"
            figures.save(getattr(figures, name)(rope), path)
            print(path)
    except (CannotShow, OSError, ValueError) as error:
        print(f"rope_ext plot: {error}", file=sys.stderr)
        return 2
    return 0


def explore(args: argparse.Namespace) -> int:
    """Writes the page. Returns 0, or 2 if it could not run."""
    from rope_ext.viz.page import page

    try:
        args.out.write_text(page(read(args)), encoding="utf-8")
    except (CannotShow, OSError, ValueError) as error:
        print(f"rope_ext explore: {error}", file=sys.stderr)
        return 2
    print(args.out.resolve().as_uri())
    return 0


def read(args: argparse.Namespace) -> Rope:
    """The rotation of --config and --layer-type, or of a model like Llama 3."""
    if args.config is None:
        return Rope.of()
    path = args.config / "config.json" if args.config.is_dir() else args.config
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CannotShow(f"--config {path}: expected JSON, got {error}") from error
    if not isinstance(config, dict):
        raise CannotShow(f"--config {path}: expected a dict, got {type(config).__name__}")
    return Rope.of(config, args.layer_type)
