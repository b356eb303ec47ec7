"""Serves three models with continuous batching over a paged KV cache, and checks every token.

    python benchmarks/paged_decode.py [--quick] [--out DIR]

SmolLM2-135M; and small models with random weights of the shape of Qwen3, whose q and k are
normalised, and of DeepSeek-V3, with latent attention. float32, greedy. Requests with different
prompts and lengths start and end at different steps. The cache is too small for all of them, so
blocks are reused. Positions and slots come from rope_ext.positions, cos and sin are computed once a
step for all layers, and one operator normalises and rotates q and k and stores k and v (compared
with the same in separate operators). The last request has a system prompt, which is read once at
the first positions, behind another text: copies of its keys are moved there. Every request must get
the same tokens as from transformers for this request alone; with a float8 cache, the same as by the
separate operators. Otherwise the run ends with an error. SmolLM2 is that of `python -m rope_ext
demo`, from its cache; if it can't be downloaded, it has random weights.
"""

import argparse
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from benchmark import OURS, PEER
from measuring import machine, settle_allocator
from paged_models import ends_of, generated_alone, served
from paged_server import Clock, PagedModel, Request, Server
from torch import nn
from tqdm import tqdm

REQUESTS, QUICK_REQUESTS = 16, 6
PROMPT, NEW_TOKENS = (8, 200), (8, 64)  # tokens, from and to
LAST_ARRIVAL = 60  # the last arrival: before this step
BLOCK_SIZE, BUDGET, MOST_RUNNING = 16, 96, 8
SYSTEM_PROMPT = 40  # tokens
SEED = 0
WAYS = {"fused": OURS, "apart": PEER}
CACHES = {"float32 cache": None, "float8 cache": torch.float8_e4m3fn}

Tick = Callable[[int], object]


def system_prompt(text: list[int], most: int | None) -> list[int]:
    return text[: min(SYSTEM_PROMPT, most or SYSTEM_PROMPT)]


def make_requests(text: list[int], count: int, most: int | None) -> list[Request]:
    """Parts of the text as prompts; a third of the requests arrive at the start.

    The last one has the system prompt between a block of text and its own prompt.
    """
    draw = random.Random(SEED)
    requests = []
    for name in range(count):
        prompt, new = (draw.randint(*bounds) for bounds in (PROMPT, NEW_TOKENS))
        if most is not None:
            prompt, new = min(prompt, most + name % 3), min(new, most + name % 2)
        last = LAST_ARRIVAL if most is None else most
        arrival = 0 if name < count // 3 else draw.randint(1, last)
        begin = draw.randrange(len(text) - prompt)
        requests.append(Request(name, text[begin : begin + prompt], new, arrival))
    behind = requests[-1]
    behind.system_at = BLOCK_SIZE
    behind.prompt = text[-BLOCK_SIZE:] + system_prompt(text, most) + behind.prompt
    return requests


def blocks_for(requests: list[Request], system: list[int]) -> int:
    """Half of the blocks that all requests need together, but at least those of the largest; and
    those of the system prompt.
    """
    needs = [math.ceil(request.most_cached / BLOCK_SIZE) for request in requests]
    return max(max(needs), sum(needs) // 2) + math.ceil(len(system) / BLOCK_SIZE)


@dataclass
class Work:
    """A model, what it is to do, and the dtype of its cache, if not that of the model."""

    model: nn.Module
    system: list[int]  # the system prompt
    requests: Callable[[], list[Request]]  # new ones
    cache: torch.dtype | None


class Run:
    """One run over all requests, a step at a time, with one way to rotate and append."""

    def __init__(self, work: Work, way: str) -> None:
        self.requests = work.requests()
        blocks = blocks_for(self.requests, work.system)
        self.model = PagedModel(work.model, blocks, BLOCK_SIZE, way, work.cache)
        limits = {"budget": BUDGET, "most_running": MOST_RUNNING, "ends": ends_of(work.model)}
        self.server = Server(self.model, blocks, system=work.system, **limits)
        self.next = self.server.serve(self.requests)
        self.steps: list[float] = []  # seconds of each step
        self.append: list[float] = []  # the part for positions, cos and sin, rotation and append

    def step(self) -> int | None:
        """Runs a step and returns the number of tokens that it generated; None at the end."""
        whole, part = Clock(self.model.device), self.model.clock.seconds
        with whole.running():
            made = next(self.next, None)
        if made is not None:
            self.steps.append(whole.seconds)
            self.append.append(self.model.clock.seconds - part)
        return made


def serve(work: Work, tick: Tick) -> dict[str, Run]:
    """Serves the same requests in every way, in turns: other load slows all ways alike."""
    runs = {way: Run(work, way) for way in WAYS}
    going = list(runs.values())
    while going:
        for run in list(going):
            made = run.step()
            if made is None:
                going.remove(run)
            else:
                tick(made)
        going.reverse()  # no way is always first
    return runs


def check(work: Work, rounds: list[dict[str, Run]]) -> None:
    """Ends the run if a request got other tokens than expected."""
    if work.cache is None:
        requests = tqdm(work.requests(), desc="each request alone", dynamic_ncols=True)
        expected = [generated_alone(work.model, r, len(work.system)) for r in requests]
    else:
        expected = [request.generated for request in rounds[0]["apart"].requests]
    wrong = [
        f"request {got.name}, {way}: {got.generated}, expected {tokens}"
        for runs in rounds
        for way, run in runs.items()
        for got, tokens in zip(run.requests, expected, strict=True)
        if got.generated != tokens
    ]
    if wrong:
        raise SystemExit("wrong tokens:\n" + "\n".join(wrong))


def requests_table(run: Run) -> list[str]:
    columns = ("request", "arrives", "prompt", "generated", "first token", "end", "blocks")
    lines = [
        "",
        "### requests",
        "",
        "Steps of arrival, of the first token and of the end; blocks of the cache, and how many of "
        "them another request had had before. The last prompt has the system prompt in it.",
        "",
        report.row([*columns, "reused"]),
        "|---" * 8 + "|",
    ]
    for r in run.requests:
        cells = (r.name, r.arrival, len(r.prompt), len(r.generated), r.first_token, r.finished)
        lines.append(report.row([str(x) for x in (*cells, r.blocks_had, r.blocks_reused)]))
    return lines


def summary(runs: dict[str, Run]) -> str:
    """The requests of the first run; of all, tokens per second and the share of rope_ext's part."""
    columns = ("model", "steps", "mixed", "tokens/s", "with prompts", "rope_ext")
    lines = [
        *requests_table(next(iter(runs.values()))),
        "",
        "### models",
        "",
        "Steps, and those with prompts and decoding; tokens generated per second, and with those "
        "of prompts; the share of positions, slots, cos and sin, rotation and append in the time. "
        "Each request got the tokens that transformers gives it alone; with a float8 cache, those "
        "of the separate steps.",
        "",
        report.row(columns),
        "|---" * len(columns) + "|",
    ]
    for case, run in runs.items():
        seconds = sum(run.steps)
        made = sum(len(r.generated) for r in run.requests)
        every = made + sum(len(r.prompt) for r in run.requests)
        steps = f"{len(run.steps)}", f"{run.server.mixed_steps}"
        speeds = f"{made / seconds:.1f}", f"{every / seconds:.1f}"
        lines.append(report.row([case, *steps, *speeds, f"{sum(run.append) / seconds:.1%}"]))
    return "\n".join(lines) + "\n"


def results_of(case: str, runs: list[dict[str, Run]]) -> list[report.Result]:
    """Times of all steps in all rounds, by way."""
    parts = {
        "rotation and append, a step": lambda run: run.append,
        "a step": lambda run: run.steps,
    }
    return [
        report.Result(
            f"{case}: {name}",
            [],
            {way: [t for each in runs for t in part(each[way])] for way in WAYS},
            WAYS,
            {},
        )
        for name, part in parts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="runs over all requests, each way")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} short requests")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for paged_decode.md, .csv and .png")
    parser.add_argument("--random-layers", type=int, help="random weights, so many layers")
    parser.add_argument("--max-tokens", type=int, help="of prompts and of texts; for tests")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    most = arguments.max_tokens or (12 if arguments.quick else None)
    count = QUICK_REQUESTS if arguments.quick else REQUESTS
    settle_allocator()
    results, last = [], {}
    for title, (model, text) in served(arguments.random_layers, 20 * PROMPT[1]).items():
        for kind, cache in CACHES.items():
            make = functools.partial(make_requests, text, count, most)
            work = Work(model.to(arguments.device), system_prompt(text, most), make, cache)
            case, rounds = f"{title}, {kind}", []
            tokens = sum(request.new_tokens for request in make()) * len(WAYS) * arguments.rounds
            with tqdm(total=tokens, desc=case, unit=" tokens", dynamic_ncols=True) as bar:
                for _ in range(arguments.rounds):
                    rounds.append(serve(work, bar.update))
            check(work, rounds)
            results += results_of(case, rounds)
            last[case] = rounds[-1]["fused"]
    setting = machine()
    tables = summary(last)
    print("\n" + report.markdown(results, setting) + tables)
    if arguments.out is not None:
        paths = report.write(arguments.out, "paged_decode", results, setting)
        with paths[0].open("a") as file:
            file.write(tables)
        print("\n".join(str(path) for path in paths))


if __name__ == "__main__":
    main()
