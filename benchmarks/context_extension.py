"""The effect of each method of context extension on a language model, before and after training.

    python benchmarks/context_extension.py --out results [--quick] [--only reading|training]

Reading, without training: SmolLM2-135M, trained to 8,192 tokens, reads 8,192, 16,384 and 32,768
tokens of one document, Python's own language reference or --text FILE. Training: a small Llama
learns the bytes of the same text in a context of 256, is extended to 1,024 by each method, and is
trained a little more. It is seeded, and the report has the spread over seeds. Both use rope_ext's
frequencies, tables and rotation, in float32.

Each result is appended to a CSV file when it is computed, and is not computed again: an interrupted
run continues. A report of all results, in Markdown and as a chart, is written at the
end.
"""

import argparse
import csv
import hashlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from extension_methods import METHODS, extended
from extension_reading import perplexity, read
from extension_training import (
    BASE,
    EXTENDED,
    LEARNING_RATE,
    SHAPE,
    TRAINED,
    extend,
    new_model,
    parts,
    train,
)
from measuring import machine
from tqdm import tqdm

from rope_ext.demo import models, weights

LENGTHS, QUICK_LENGTHS = (8192, 16384, 32768), (9216,)
BUCKETS = (0, 2048, 4096, 8192, 12288, 16384, 24576, 32768)  # first position of each bucket
STEPS, QUICK_STEPS = 1500, 150  # of the small model, in its first context
EXTENDING_STEPS, QUICK_EXTENDING_STEPS = 200, 20
SEEDS, QUICK_SEEDS = 3, 1
QUICK_METHODS = ("none", "NTK", "YaRN")

READING, TRAINING = "context_extension_reading", "context_extension_training"
COLUMNS = {
    READING: ("text", "method", "length", "first", "end", "perplexity", "seconds", "peak_bytes"),
    TRAINING: ("text", "steps", "seed", "method", "extending_steps", "first", "end", "perplexity"),
}
Row = dict[str, str]


class Results:
    """The rows of a CSV file; each result is written as soon as it is computed."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.columns = folder / f"{name}.csv", COLUMNS[name]
        self.rows: list[Row] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, **values: object) -> list[Row]:
        wanted = {key: str(value) for key, value in values.items()}
        return [row for row in self.rows if wanted.items() <= row.items()]

    def add(self, rows: list[dict[str, object]]) -> None:
        self.rows += [{key: str(value) for key, value in row.items()} for row in rows]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


def buckets(length: int, bounds: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """[first, end) of each bucket up to `length`."""
    inside = [bound for bound in bounds if bound < length]
    yield from zip(inside, [*inside[1:], length], strict=True)


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:12]


def run_reading(arguments: argparse.Namespace, text: str, results: Results) -> str:
    if arguments.random_layers is None:
        gguf = weights.smollm2_gguf(weights.cache_folder(), print)
        model, tokenizer = models.load_pretrained(str(gguf))
        title = "SmolLM2-135M-Instruct"
    else:
        model, tokenizer = models.random_model(arguments.random_layers)
        title = f"random weights, {arguments.random_layers} layers"
    trained = model.config.max_position_embeddings
    tokens = torch.tensor([tokenizer.encode(text)])
    key = digest(f"{title} {text}".encode())
    todo = [
        (length, method)
        for length in arguments.lengths
        for method in arguments.methods
        # within the context of the training no method changes anything
        if (length > trained or method == "none")
        and not results.of(text=key, method=method, length=length)
    ]
    longest = max((length for length, _ in todo), default=0)
    if tokens.shape[1] < longest:
        raise SystemExit(f"the text has {tokens.shape[1]:,} tokens, fewer than {longest:,}")
    with tqdm(total=sum(length for length, _ in todo), unit="token", dynamic_ncols=True) as bar:
        for length, method in todo:
            bar.set_description(f"reading {length:,} tokens, {method}")
            with extended(model, method, trained, length):
                reading = read(model, tokens[:, :length], bar.update)
            cost = {"seconds": f"{reading.seconds:.1f}", "peak_bytes": reading.peak_bytes}
            results.add(
                [
                    {
                        "text": key,
                        "method": method,
                        "length": length,
                        "first": first,
                        "end": end,
                        "perplexity": f"{perplexity(reading.nll[max(first - 1, 0) : end - 1]):.4f}",
                        **cost,
                    }
                    for first, end in buckets(length, BUCKETS)
                ]
            )
    return key


def run_training(arguments: argparse.Namespace, text: str, results: Results) -> str:
    content = text.encode()
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    key = digest(content)
    steps, extending = arguments.steps, arguments.extending_steps
    of_run = {"text": key, "steps": steps, "extending_steps": extending}
    missing = {
        seed: [m for m in arguments.methods if not results.of(seed=seed, method=m, **of_run)]
        for seed in range(arguments.seeds)
    }
    total = sum(steps + extending * len(left) for left in missing.values() if left)
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for seed, left in missing.items():
            if not left:
                continue
            bar.set_description(f"seed {seed}, context {TRAINED}")
            model = new_model(seed)
            train(model, parts(data)[0], TRAINED, steps, LEARNING_RATE, seed, bar.update)
            for method in left:
                bar.set_description(f"seed {seed}, context {EXTENDED}, {method}")
                found = extend(model, method, data, extending, seed, bar.update)
                results.add(
                    [
                        {
                            "text": key,
                            "steps": steps,
                            "seed": seed,
                            "method": method,
                            "extending_steps": after,
                            "first": first,
                            "end": end,
                            "perplexity": f"{perplexity(nll[max(first - 1, 0) : end - 1]):.4f}",
                        }
                        for after, nll in found.items()
                        for first, end in buckets(EXTENDED, (0, TRAINED, EXTENDED // 2))
                    ]
                )
    return key


# The report


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def reading_table(rows: list[Row]) -> list[str]:
    spans = sorted({(int(row["first"]), int(row["end"])) for row in rows})
    heads = [f"{first:,} to {end:,}" for first, end in spans]
    lines = [line(["read", "method", *heads, "tokens/s", "peak GiB"])]
    lines.append("|---" * (4 + len(heads)) + "|")
    runs: dict[tuple[int, str], dict[tuple[int, int], Row]] = {}
    for row in rows:
        run = runs.setdefault((int(row["length"]), row["method"]), {})
        run[int(row["first"]), int(row["end"])] = row
    for (length, method), of in sorted(runs.items(), key=lambda item: item[0][0]):
        any_row = next(iter(of.values()))
        cells = [f"{float(of[span]['perplexity']):.2f}" if span in of else "" for span in spans]
        peak = any_row["peak_bytes"]
        cells.append(f"{length / float(any_row['seconds']):.0f}")
        cells.append("" if peak == "None" else f"{int(peak) / 2**30:.2f}")
        lines.append(line([f"{length:,}", method, *cells]))
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def training_table(rows: list[Row]) -> list[str]:
    spans = sorted({(int(row["first"]), int(row["end"])) for row in rows})
    steps = sorted({int(row["extending_steps"]) for row in rows})
    heads = [f"{first:,} to {end:,}, {n} steps" for n in steps for first, end in spans]
    lines = [line(["method", *heads]), "|---" * (1 + len(heads)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for n in steps:
            for first, end in spans:
                wanted = (method, str(n), str(first), str(end))
                cells.append(
                    spread(
                        [
                            float(row["perplexity"])
                            for row in rows
                            if (row["method"], row["extending_steps"], row["first"], row["end"])
                            == wanted
                        ]
                    )
                )
        lines.append(line([method, *cells]))
    return lines


def report(reading: list[Row], training: list[Row], setting: str) -> str:
    lines = ["# Context extension", "", f"{setting}. Perplexity by position."]
    if reading:
        lines += ["", "## Read without any training", "", *reading_table(reading)]
    if training:
        seeds = len({row["seed"] for row in training})
        lines += [
            "",
            f"## A small Llama, from {TRAINED} bytes of context to {EXTENDED:,}",
            "",
            f"{SHAPE['num_hidden_layers']} layers of {SHAPE['hidden_size']}, base {BASE:g}, "
            f"{training[0]['steps']} steps of training; then each method, without and with more "
            f"steps. Of {seeds} seeds the median, the least and the largest; of a byte.",
            "",
            *training_table(training),
        ]
    return "\n".join(lines) + "\n"


def chart(path: Path, reading: list[Row], training: list[Row]) -> None:
    """Perplexity against position: a panel for each length that was read, and two for training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, list[Row]]] = []
    for length in sorted({int(row["length"]) for row in reading}):
        rows = [row for row in reading if int(row["length"]) == length]
        if len({row["method"] for row in rows}) > 1:
            panels.append((f"SmolLM2 reads {length:,} tokens", rows))
    for steps in sorted({int(row["extending_steps"]) for row in training}):
        rows = [row for row in training if int(row["extending_steps"]) == steps]
        panels.append((f"small Llama, {steps} steps at {EXTENDED:,} bytes", rows))
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[0], panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            of = [row for row in rows if row["method"] == method]
            spans = sorted({(int(row["first"]), int(row["end"])) for row in of})
            medians = [
                statistics.median(
                    float(row["perplexity"]) for row in of if int(row["first"]) == first
                )
                for first, _ in spans
            ]
            axis.plot([end for _, end in spans], medians, marker="o", label=method)
        axis.set(
            title=title, xlabel="position (end of a bucket)", ylabel="perplexity", yscale="log"
        )
        axis.locator_params(axis="x", nbins=5)
    axes[0][-1].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--text", type=Path, help="a long document instead of Python's reference")
    parser.add_argument("--only", choices=("reading", "training"), help="one of the two")
    parser.add_argument("--quick", action="store_true", help="less of everything: some minutes")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens to read")
    parser.add_argument("--steps", type=int, help="of the small model's training")
    parser.add_argument("--extending-steps", type=int, help="in its longer context")
    parser.add_argument("--seeds", type=int, help="small models")
    parser.add_argument("--random-layers", type=int, help="random weights, so many layers")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.methods = QUICK_METHODS if quick else tuple(METHODS)
    arguments.lengths = arguments.lengths or (QUICK_LENGTHS if quick else LENGTHS)
    arguments.steps = arguments.steps or (QUICK_STEPS if quick else STEPS)
    arguments.extending_steps = arguments.extending_steps or (
        QUICK_EXTENDING_STEPS if quick else EXTENDING_STEPS
    )
    arguments.seeds = arguments.seeds or (QUICK_SEEDS if quick else SEEDS)

    text = arguments.text.read_text() if arguments.text else models.real_text()
    reading, training = (Results(arguments.out, name) for name in (READING, TRAINING))
    start = time.strftime("%Y-%m-%d")
    of_reading: list[Row] = []
    of_training: list[Row] = []
    if arguments.only != "training":
        of_reading = reading.of(text=run_reading(arguments, text, reading))
    if arguments.only != "reading":
        key = run_training(arguments, text, training)
        of_training = training.of(text=key, steps=arguments.steps)
    written = report(of_reading, of_training, f"{machine()}; begun {start}")
    print("\n" + written)
    (arguments.out / "context_extension.md").write_text(written)
    chart(arguments.out / "context_extension.png", of_reading, of_training)


if __name__ == "__main__":
    main()
