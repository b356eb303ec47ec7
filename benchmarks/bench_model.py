"""Times a whole model, SmolLM2-135M, with its own rotation and patched: prompt, decoding, training.

    python benchmarks/bench_model.py [--quick] [--no-compile] [--out DIR]

float32. Five ways in interleaved rounds: unpatched and patched, both eager and compiled; and, as a
lower bound for every implementation, eager without the rotation. Before it is timed, the logits of
each way are compared with those of the unpatched eager model. The model is that of
`python -m rope_ext demo`, from its cache; if it can't be downloaded, a model of the same shape with
random weights, which the report says.
"""

import argparse
import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import report
import torch
from benchmark import FLOOR, OURS, PEER
from measuring import machine, measure, settle_allocator
from torch import Tensor, nn
from tqdm import tqdm

from rope_ext.demo import model_rotation, models, weights
from rope_ext.integrations.transformers import patch

PROMPT, DECODED, CONTEXT, BATCH, SEQ = 2048, 128, 16, 2, 512  # tokens; CONTEXT: before decoding
QUICK_SHARE = 16  # --quick divides these by it
ROUNDS, QUICK_ROUNDS = 15, 2
LEARNING_RATE = 1e-9  # so small that the model does not change
LOGITS_TOLERANCE = 1e-3  # relative to the largest value: a compiled model sums in another order
PATCHED, UNPATCHED, WITHOUT = "patched", "unpatched", "without rotation"
COMPILED = ", compiled"
KINDS = {PATCHED: OURS, UNPATCHED: PEER, WITHOUT: FLOOR}

Step = Callable[[], object]


def load(random_layers: int | None) -> tuple[nn.Module, object, str]:
    """The model, its tokenizer and its description."""
    name = "SmolLM2-135M-Instruct"
    if random_layers is None:
        try:
            gguf = weights.smollm2_gguf(weights.cache_folder(), print)
            return *models.load_pretrained(str(gguf)), name
        except weights.DownloadFailed as error:
            print(f"{name} is not there: {error}")
            random_layers = 30
    return *models.random_model(random_layers), f"random weights, {random_layers} layers, {name}"


def kind(way: str) -> str:
    return KINDS[way.removesuffix(COMPILED)]


@contextlib.contextmanager
def rotation_left_out(model: nn.Module):
    """Within the block every model of this family leaves q and k as they are."""
    with model_rotation.replaced_rotary(model, lambda original: lambda q, k, *rest: (q, k)):
        yield


def with_context(step: Step, context: Callable[[], contextlib.AbstractContextManager]) -> Step:
    def within() -> object:
        with context():
            return step()

    return within


def variants(model: nn.Module, compiled: bool) -> dict[str, tuple[nn.Module, nn.Module]]:
    """For each way, the module to call and the model that it runs."""
    patched = copy.deepcopy(model)
    patch(patched)
    found = {UNPATCHED: (model, model), PATCHED: (patched, patched), WITHOUT: (model, model)}
    if compiled:
        for way in (UNPATCHED, PATCHED):
            found[way + COMPILED] = (torch.compile(found[way][0], dynamic=False), found[way][0])
    return found


def prefill(call: nn.Module, tokens: Tensor) -> Step:
    """Reads a prompt int64 [1, S]. Returns the logits of its last token."""

    @torch.inference_mode()
    def step() -> Tensor:
        return call(tokens, use_cache=False, logits_to_keep=1).logits

    return step


def decode(call: nn.Module, model: nn.Module, text: Tensor, count: int) -> Step:
    """Reads text int64 [1, S]: all but the last `count` tokens at once, then these one by one with
    a KV cache. Returns the logits after the last.
    """
    from transformers import StaticCache

    seq = text.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=seq)
    # the argument's name in the newest transformers, and its older name
    parameters = inspect.signature(model.forward).parameters
    cached = {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}
    places = torch.arange(seq)[None]

    @torch.inference_mode()
    def step() -> Tensor:
        cache.reset()
        # eager: a compiled call would need another graph
        logits = model(text[:, : seq - count], logits_to_keep=1, **cached).logits
        for i in range(seq - count, seq):
            token, place = text[:, i : i + 1], places[:, i : i + 1]
            logits = call(token, position_ids=place, logits_to_keep=1, **cached).logits
        return logits

    return step


def training(call: nn.Module, model: nn.Module, tokens: Tensor) -> Step:
    """Forward, backward and AdamW on tokens int64 [B, S]. Returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        loss = call(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def verified(steps: dict[str, Step]) -> dict[str, Step]:
    """Ends the run if the logits or the loss of a way differ from the unpatched model's."""
    expected = steps[UNPATCHED]()
    for way, step in steps.items():
        got = step()
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if way == WITHOUT:
            if error == 0:
                raise SystemExit("leaving out the rotation changes nothing: it was not left out")
        elif not error <= LOGITS_TOLERANCE:
            raise SystemExit(f"{way} is wrong: error {error:.3g} above {LOGITS_TOLERANCE:g}")
    return steps


def run(arguments: argparse.Namespace) -> tuple[list[report.Result], str]:
    share = QUICK_SHARE if arguments.quick else 1
    compiled = not (arguments.quick or arguments.no_compile)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    length, count, context, batch, seq = (
        max(1, min(size // share, arguments.max_tokens or size))
        for size in (PROMPT, DECODED, CONTEXT, BATCH * share, SEQ)
    )
    model, tokenizer, title = load(arguments.random_layers)
    setting = f"{title}; {machine()}"
    device = torch.device("cpu")
    text = models.text_tokens(tokenizer, max(length, context + count, batch * seq), device)
    ways = variants(model, compiled)
    no_rotation = functools.partial(rotation_left_out, model)
    cases: dict[str, Callable[[nn.Module, nn.Module], Step]] = {
        f"prompt of {length:,} tokens": lambda call, _: prefill(call, text[:, :length]),
        f"decoding {count} tokens": lambda call, own: decode(
            call, own, text[:, : context + count], count
        ),
        f"training step, {batch} x {seq} tokens": lambda call, own: training(
            call, own, text[:, : batch * seq].view(batch, seq)
        ),
    }
    settle_allocator()
    results = []
    with tqdm(total=len(cases) * rounds, dynamic_ncols=True) as bar:
        for name, make in cases.items():
            bar.set_description(f"{name}: verifying" + ", compiling" * compiled)
            torch.compiler.reset()
            model.train(name.startswith("training"))
            steps = {way: make(*of) for way, of in ways.items()}
            steps[WITHOUT] = with_context(steps[WITHOUT], no_rotation)
            verified(steps)
            bar.set_description(name)
            times = measure(steps, rounds, bar.update)
            kinds = {way: kind(way) for way in times}
            ordered = {way: times[way] for way in sorted(times, key=lambda way: kinds[way] != OURS)}
            results.append(report.Result(name, [], ordered, kinds, {}))
    return results, setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, not compiled")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--out", type=Path, help="folder for bench_model.md, .csv and .png")
    parser.add_argument("--random-layers", type=int, help="random weights, so many layers")
    parser.add_argument("--max-tokens", type=int, help="of every length; for tests")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results, setting = run(arguments)
    print("\n" + report.markdown(results, setting))
    if arguments.out is not None:
        paths = report.write(arguments.out, "bench_model", results, setting)
        print("\n".join(str(path) for path in paths))


if __name__ == "__main__":
    main()
