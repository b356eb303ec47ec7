"""Extends the context of a model four times, by YaRN and other methods, and measures.

    python examples/extend_context.py [--steps 600]

The model is trained as in train_llama.py and not trained on: only the frequencies change. Windows
of the text are read from their start, so the first column is within the context of the training.
"""

import argparse
import itertools

import torch
from llama import Llama
from train_llama import LENGTH, bits, source_text, train

import rope_ext

FACTOR, WINDOWS = 4, 32
ORIGINAL = {"original_max_position_embeddings": LENGTH}
METHODS = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": FACTOR},
    "NTK": {"rope_type": "ntk", "alpha": FACTOR},
    "YaRN": {"rope_type": "yarn", "factor": FACTOR, **ORIGINAL},
}


@torch.inference_mode()
def bits_by_position(model: Llama, scaling: dict) -> list[float]:
    """The mean bits a byte at positions within the training's, up to twice and up to four times."""
    head_dim, interleaved = model.rotary.head_dim, model.rotary.interleaved
    model.rotary = rope_ext.RotaryEmbedding(head_dim, scaling=scaling, interleaved=interleaved)
    longest = FACTOR * LENGTH
    windows = source_text()[: WINDOWS * (longest + 1)].view(WINDOWS, -1).long()
    read = bits(model(windows[:, :-1]), windows).mean(0)  # [longest]
    ends = (0, LENGTH, 2 * LENGTH, longest)
    return [read[a:b].mean().item() for a, b in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    torch.manual_seed(0)
    model = Llama()
    train(model, parser.parse_args().steps)
    print(
        f"bits a byte   {'to ' + str(LENGTH):>8} {'to ' + str(2 * LENGTH):>8} {FACTOR * LENGTH:>8}"
    )
    results = {name: bits_by_position(model, scaling) for name, scaling in METHODS.items()}
    for name, row in results.items():
        print(f"{name:12} " + " ".join(f"{value:8.3f}" for value in row))
    none, yarn = results["none"], results["YaRN"]
    print(
        f"Shown: past {2 * LENGTH} tokens, bits a byte change by {none[2] - none[0]:+.3f} without a"
    )
    print(
        f"method and by {yarn[2] - none[0]:+.3f} with YaRN, from those within the trained context."
    )


if __name__ == "__main__":
    main()
