"""Serves SmolLM2-135M with continuous batching over a paged KV cache, and checks every token.

    python benchmarks/paged_decode.py [--quick] [--out DIR]

float32, greedy. Requests with different prompts and lengths start and end at different steps. The
cache is too small for all of them, so blocks are reused. Positions and slots come from
rope_ext.positions, cos and sin are computed once a step for all layers, and one operator rotates q
and k and stores k and v (compared with the same in three operators). Every request must get the
same tokens as from transformers' generate for this request alone; otherwise the run ends with an
error. The model is that of `python -m rope_ext demo`, from its cache; if it can't be downloaded, it
has random weights.
"""

import argparse
import functools
import random
from collections.abc import Callable
from pathlib import Path

import bench_model
import report
import torch
from benchmark import OURS, PEER
from measuring import machine, settle_allocator
from paged_server import Append, Clock, PagedLlama, Request, Server, apart, fused
from torch import nn
from tqdm import tqdm

from rope_ext.demo import models

REQUESTS, QUICK_REQUESTS = 16, 6
PROMPT, NEW_TOKENS = (8, 200), (8, 64)  # tokens, from and to
LAST_ARRIVAL = 60  # the last arrival: before this step
BLOCK_SIZE, BUDGET, MOST_RUNNING = 16, 96, 8
SEED = 0
WAYS: dict[str, Append] = {"fused": fused, "apart": apart}

Tick = Callable[[int], object]


def make_requests(text: list[int], count: int, most: int | None) -> list[Request]:
    """Parts of the text as prompts; a third of the requests arrive at the start."""
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
    return requests


def blocks_for(requests: list[Request]) -> int:
    """Half of the blocks that all requests need together, but at least those of the largest."""
    needs = [-(-request.most_cached // BLOCK_SIZE) for request in requests]
    return max(max(needs), sum(needs) // 2)


def ends_of(model: nn.Module) -> frozenset[int]:
    """The tokens at which generate stops."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def generated_alone(model: nn.Module, request: Request) -> list[int]:
    """The tokens from transformers, with its own rotation and cache."""
    prompt = torch.tensor([request.prompt], device=model.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


class Run:
    """One run over all requests, a step at a time, with one way to rotate and append."""

    def __init__(self, model: nn.Module, requests: list[Request], append: Append) -> None:
        blocks = blocks_for(requests)
        self.requests = requests
        self.llama = PagedLlama(model, blocks, BLOCK_SIZE, append)
        limits = {"budget": BUDGET, "most_running": MOST_RUNNING, "ends": ends_of(model)}
        self.server = Server(self.llama, blocks, **limits)
        self.next = self.server.serve(requests)
        self.steps: list[float] = []  # seconds of each step
        self.append: list[float] = []  # the part for positions, cos and sin, rotation and append

    def step(self) -> int | None:
        """Runs a step and returns the number of tokens that it generated; None at the end."""
        whole, part = Clock(self.llama.device), self.llama.clock.seconds
        with whole.running():
            made = next(self.next, None)
        if made is not None:
            self.steps.append(whole.seconds)
            self.append.append(self.llama.clock.seconds - part)
        return made


def serve(model: nn.Module, make: Callable[[], list[Request]], tick: Tick) -> dict[str, Run]:
    """Serves the same requests in every way, in turns: other load slows all ways alike."""
    runs = {way: Run(model, make(), append) for way, append in WAYS.items()}
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


def check(model: nn.Module, runs: list[Run]) -> None:
    """Ends the run if a request got other tokens than it gets alone."""
    wrong = []
    for requests in tqdm(
        list(zip(*(run.requests for run in runs), strict=True)),
        desc="each request alone",
        dynamic_ncols=True,
    ):
        expected = generated_alone(model, requests[0])
        for got in requests:
            if got.generated != expected:
                wrong.append(f"request {got.name}: {got.generated}, alone {expected}")
    if wrong:
        raise SystemExit("wrong tokens:\n" + "\n".join(wrong))


def summary(run: Run) -> str:
    """The requests, tokens per second, and the share of rope_ext's part."""
    columns = ("request", "arrives", "prompt", "generated", "first token", "end", "blocks")
    lines = [
        "",
        "### requests",
        "",
        "Steps of arrival, of the first token and of the end; blocks of the cache, and how many of "
        "them another request had had before. Each got the tokens that generate gives it alone.",
        "",
        report.row([*columns, "reused"]),
        "|---" * 8 + "|",
    ]
    for r in run.requests:
        cells = (r.name, r.arrival, len(r.prompt), len(r.generated), r.first_token, r.finished)
        lines.append(report.row([str(x) for x in (*cells, r.blocks_had, r.blocks_reused)]))
    seconds = sum(run.steps)
    read = sum(len(r.prompt) for r in run.requests)
    made = sum(len(r.generated) for r in run.requests)
    lines += [
        "",
        f"{made} tokens generated and {read} of prompts read in {seconds:.2f} s and "
        f"{len(run.steps)} steps, {run.server.mixed_steps} of them with prompts and decoding: "
        f"**{made / seconds:.1f} tokens/s** generated, {(made + read) / seconds:.1f} in all.",
        "",
        "Positions, slots, cos and sin, rotation and append take "
        f"**{sum(run.append) / seconds:.1%}** of the time.",
    ]
    return "\n".join(lines) + "\n"


def results_of(runs: dict[str, list[Run]]) -> list[report.Result]:
    """Times of all steps in all rounds, by way."""
    kinds = {"fused": OURS, "apart": PEER}
    parts = {
        "rotation and append, a step": lambda run: run.append,
        "a step": lambda run: run.steps,
    }
    return [
        report.Result(
            case,
            [],
            {way: [t for run in rounds for t in part(run)] for way, rounds in runs.items()},
            kinds,
            {},
        )
        for case, part in parts.items()
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
    model, tokenizer, title = bench_model.load(arguments.random_layers)
    model = model.to(arguments.device)
    setting = f"{title}; {machine()}"
    most = arguments.max_tokens or (12 if arguments.quick else None)
    text = models.text_tokens(tokenizer, 20 * PROMPT[1], torch.device("cpu"))[0].tolist()
    count = QUICK_REQUESTS if arguments.quick else REQUESTS
    settle_allocator()
    make = functools.partial(make_requests, text, count, most)
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    tokens = sum(request.new_tokens for request in make()) * len(WAYS) * arguments.rounds
    with tqdm(total=tokens, desc=f"{count} requests", unit=" tokens", dynamic_ncols=True) as bar:
        for _ in range(arguments.rounds):
            for way, run in serve(model, make, bar.update).items():
                runs[way].append(run)
    check(model, [run for rounds in runs.values() for run in rounds])
    results = results_of(runs)
    served = summary(runs["fused"][-1])
    print("\n" + report.markdown(results, setting) + served)
    if arguments.out is not None:
        paths = report.write(arguments.out, "paged_decode", results, setting)
        with paths[0].open("a") as file:
            file.write(served)
        print("\n".join(str(path) for path in paths))


if __name__ == "__main__":
    main()
