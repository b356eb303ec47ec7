"""The demo: a language model with its own rotary function and with rope_ext, side by side.

weights.py         SmolLM2-135M: downloaded, checked, cached
models.py          the model, pretrained or random, and the text it reads
model_rotation.py  replaces a model's rotary function
compare.py         differences in tokens, logits, gradients and time
scaling.py         another rope scaling for the model; differences in frequencies and tables
"""

import argparse
import contextlib
import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

import rope_ext
from rope_ext.demo import compare, model_rotation, models, scaling, weights

NEEDED = ("transformers", "gguf", "accelerate")


class CannotRun(Exception):
    """The demo has nothing to compare. The message gives the reason and the remedy."""


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 0: all equal, 1: something differs, 2: the demo could not run."""
    try:
        return clear_cache() if args.clear_cache else compare_and_report(args)
    except (
        CannotRun,
        weights.ChecksumMismatch,
        model_rotation.NotLlamaForm,
        scaling.NotScalable,
    ) as error:
        print(f"rope_ext demo: {error}", file=sys.stderr)
        return 2
    except compare.NeverCalled as error:
        print(f"rope_ext demo: FAILED: {error}", file=sys.stderr)
        return 1


def compare_and_report(args: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(f"{', '.join(missing)} not installed: pip install 'rope_ext[demo]'")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise CannotRun(f"--device {args.device}: torch {torch.__version__} finds no CUDA GPU")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:  # Python turns a byte that is not UTF-8 into a lone surrogate
        raise CannotRun(f"expected --prompt to be text in UTF-8, got {args.prompt!a}") from None

    model, tokenizer, title = load(args)
    replaced = model_rotation.require_llama_form(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", args.prompt_tokens)
    scaled = None
    if args.rope_scaling:
        scaled = scaling.apply(model, args.rope_scaling, args.factor, args.original)
        limit = int(limit * args.factor)
    model.to(args.device)
    prompt_tokens = min(args.prompt_tokens, limit)
    if prompt_tokens < args.prompt_tokens:
        say(f"the model reads {limit:,} tokens at most: --prompt-tokens {limit}")
    describe(model, title, replaced, args.device, scaled)

    device = torch.device(args.device)
    prompt = models.chat_tokens(tokenizer, args.prompt, device)
    if prompt.numel() == 0:
        raise CannotRun("--prompt has no tokens")
    say(f"generating {args.tokens} tokens, twice")
    generation = compare.compare_generation(model, prompt, args.tokens)
    show_side_by_side(args.prompt, tokenizer, generation)

    say(f"reading a prompt of {prompt_tokens:,} tokens, three times")
    long_prompt = compare.compare_prompt(
        model, models.text_tokens(tokenizer, prompt_tokens, device)
    )
    say(f"taking the gradients of {args.train_tokens:,} tokens, three times")
    batch = models.text_tokens(tokenizer, min(args.train_tokens, limit), device)
    step_checks, step_calls = compare.compare_training_step(model, batch)

    checks = [generation.check, *long_prompt.checks, *step_checks]
    if args.rope_scaling:
        say(f"generating {args.tokens} tokens once more, with the tables of rope_ext")
        checks += [
            scaling.check_frequencies(model),
            scaling.check_generation(model, prompt, generation.own),
        ]
    show_checks(checks)
    layers = model.config.get_text_config().num_hidden_layers
    calls = (generation.calls, long_prompt.calls, step_calls)
    print(
        f"\nrope_ext ran {calls[0]:,} times in generating, {calls[1]:,} in the prompt and "
        f"{calls[2]:,} in the training step: as often\nas the function it replaced, "
        f"in a model of {layers} layers."
    )
    show_timings(model, {"prefill": long_prompt.prefill_call, "decode": generation.decode_call})

    failed = [check.name for check in checks if not check.passed]
    print(
        "\nFAILED: " + "; ".join(failed)
        if failed
        else f"\nPASSED: all {len(checks)} comparisons within tolerance"
    )
    return 1 if failed else 0


def say(text: str) -> None:
    """Prints progress to stderr, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def load(args: argparse.Namespace) -> tuple[nn.Module, object, str]:
    """The model, its tokenizer and its description."""
    random_title = (
        f"RANDOM WEIGHTS (seed {models.RANDOM_SEED}) in the shape of SmolLM2-135M, a token a byte: "
        "the text means nothing"
    )
    if args.random:
        return *models.random_model(args.random_layers), random_title
    if args.model:
        say(f"loading {args.model}")
        try:
            return *models.load_pretrained(args.model), args.model
        except (OSError, ValueError, KeyError) as error:
            raise CannotRun(
                f"--model {args.model} can't be loaded from this machine: {error}"
            ) from error
    cache = weights.cache_folder()
    try:
        with usable(cache):
            gguf = weights.smollm2_gguf(cache, say)
            say(f"loading {gguf}")
            return *models.load_pretrained(str(gguf)), "SmolLM2-135M-Instruct"
    except weights.DownloadFailed as error:
        print(
            f"SmolLM2-135M is not in {cache} and could not be fetched:\n  {error}\n"
            "A randomly initialised model of the same shape runs instead.\n"
        )
        return *models.random_model(args.random_layers), random_title


def clear_cache() -> int:
    cache = weights.cache_folder()
    with usable(cache):
        removed = weights.clear(cache, say)
    print(f"removed from {cache}: {', '.join(removed) or 'nothing, as nothing was there'}")
    return 0


@contextlib.contextmanager
def usable(cache: Path) -> Iterator[None]:
    """Turns an OSError in the cache into a message instead of a traceback."""
    try:
        yield
    except OSError as error:
        raise CannotRun(
            f"the cache {cache} can't be used: {error}; ROPE_EXT_CACHE names another folder"
        ) from error


def describe(
    model: nn.Module, title: str, replaced: list[str], device: str, scaled: str | None
) -> None:
    config = model.config.get_text_config()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    where = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{torch.get_num_threads()} threads"
    )
    rows = {
        "model": title,
        "": f"{type(model).__name__}, {millions:.1f} million parameters, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query and "
        f"{config.num_key_value_heads} key heads",
        "in": f"float32 on {device} ({where}), torch {torch.__version__}, "
        f"rope_ext {rope_ext.__version__}",
        "replaced": ", ".join(replaced),
    }
    if scaled:
        rows["scaling"] = scaled
    for name, value in rows.items():
        print(f"{name:8}  {value}")


def columns(left: str, right: str, width: int) -> str:
    """Two texts side by side, each wrapped to `width` characters."""
    wrapped = [
        [line for part in text.splitlines() for line in textwrap.wrap(part, width)]
        for text in (left, right)
    ]
    return "\n".join(f"{a:{width}} | {b}".rstrip() for a, b in zip_longest(*wrapped, fillvalue=""))


def show_side_by_side(prompt: str, tokenizer, generation: compare.Generation) -> None:
    width = (min(shutil.get_terminal_size((120, 24)).columns, 140) - 3) // 2
    own, ours = (tokenizer.decode(tokens.tolist()) for tokens in (generation.own, generation.ours))
    print(f"\nprompt: {prompt}\nanswer, {len(generation.own)} tokens, greedy, rotated by")
    print(columns("transformers", "rope_ext", width))
    print("-" * width + "-+-" + "-" * width)
    print(columns(own, ours, width))


def show_checks(checks: list[compare.Check]) -> None:
    width = max(len(check.name) for check in checks)
    print(f"\n{'largest difference in':{width}}  {'found':>9}  {'tolerance':>9}")
    for check in checks:
        verdict = "ok" if check.passed else "DIFFERS"
        line = f"{check.name:{width}}  {check.difference:9.3g}  {check.tolerance:9.3g}  {verdict:7}"
        print(f"{line}  {check.note}".rstrip())
    print(
        "Zeros are expected: in float32 rope_ext does the arithmetic of x cos + rotate_half(x) sin "
        "in\nthe same order. Tolerances: rotated q and k 2^-22 of |x cos| + |rotate_half(x) sin|, "
        "what two\ncorrect roundings allow; logits and gradients "
        f"{compare.ONE_ULP_FACTOR:g} times what the model shows without\nrope_ext when each number "
        "that its rotary function returns, and each gradient that it\nreceives, "
        "is moved by one unit in the last place."
    )


def show_timings(model: nn.Module, calls: dict[str, model_rotation.Call]) -> None:
    original, _ = model_rotation.own_rotations(model)[0]
    print(
        f"\nmicroseconds a call, median (10 - 90 %) of {compare.TIMING_ROUNDS} interleaved rounds, "
        "on the model's own q and k"
    )
    for name, call in calls.items():
        own, ours = compare.time_side_by_side(
            call, [original, model_rotation.with_rope_ext(original)]
        )
        shapes = [f"{list(x.shape)} strides {list(x.stride())}" for x in call[:2]]
        print(f"{name:8} q {shapes[0]}, k {shapes[1]}")
        for label, t in (("transformers", own), ("rope_ext", ours)):
            print(f"    {label:12} {t.median:9.1f}  ({t.low:.1f} - {t.high:.1f})")
        print(f"    {'ratio':12} {own.median / ours.median:9.1f}")
