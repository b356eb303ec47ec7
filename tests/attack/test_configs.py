"""Damaged and hostile configs: a ValueError that says what is wrong, or the right frequencies.

Never another exception, never more than a second, and never memory for a refused config.
"""

import contextlib
import copy
import io
import json
import math
import re
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from numbered_cases import numbers
from published_configs import (
    DEEPSEEK_YARN,
    GPT_OSS_YARN,
    LLAMA31,
    PHI3_LONG,
    PHI3_SHORT,
    PUBLISHED,
    config_json,
)
from torch.utils._python_dispatch import TorchDispatchMode

from rope_ext import RotaryEmbedding, frequencies
from rope_ext.__main__ import main
from rope_ext.frequencies.config import resolve
from rope_ext.frequencies.scaling import rope_type_of
from rope_ext.viz import ModelRotation

BATCH = 50
SECONDS = 1.0  # processor time of one call
BYTES = 2**23  # for one tensor, and for Python's objects in one call; 65,536 channels take 2^17
FORM = re.compile(r"(frequencies\.\w+|RotaryEmbedding(\.\w+)?|viz): expected .+, got .+")
# 2^-24 of the exponent, times ln of the largest base in float32, and a few more roundings
RELATIVE = 2.0**-24 * 128

KINDS = ["sliding_attention", "full_attention"]
LAYERS = {"layer_types": KINDS * 3, "no_rope_layers": [1, 0] * 3}
MOE_MSCALE = {"short_mscale": 1.2, "long_mscale": 1.5, "original_max_position_embeddings": 4096}
PHIMOE = {"type": "longrope", "short_factor": PHI3_SHORT, "long_factor": PHI3_LONG, **MOE_MSCALE}
CONFIGS = [
    *(config for config, _ in PUBLISHED.values()),
    # entries that the published configs above do not have
    config_json("smollm3", 2048, 16, 65536, rope_theta=2e6, **LAYERS),
    config_json("granite_swa", 2048, 16, 8192, layer_types=KINDS, layer_rope_theta=[1e4, 0.0]),
    config_json("dots3_note_text", 512, 4, 4096, rope_parameters={"rope_theta": 8e7}, head_dim=128,
                layer_types=KINDS, per_layer_config={"01": {"head_dim": 64}}),
    config_json("phimoe", 3072, 32, 131072, rope_scaling=PHIMOE),
    config_json("mistral4", 4096, 32, 8192, qk_rope_head_dim=64, qk_nope_head_dim=64,
                rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    config_json("falcon", 4544, 71, 2048, alibi=False, rope_interleave=True, rope_ratio=1),
    config_json("pixtral", 1024, 16, 2048, rope_parameters={"rope_type": "axial"}),
    config_json("modernbert", 768, 12, 8192, global_rope_theta=16e4, local_rope_theta=1e4),
    {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_positions": 2048},
    {"head_dim": 64, "max_position_embeddings": 4096, "rope_scaling": {"type": "ntk", "factor": 4}},
    {"model_type": "gemma3", "text_config": copy.deepcopy(PUBLISHED["Gemma-3-4b, full"][0])},
]  # fmt: skip
SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "ntk", "factor": 4.0},
    {"type": "ntk_alpha", "alpha": 1000.0},
    {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
    *(LLAMA31, DEEPSEEK_YARN, GPT_OSS_YARN, PHIMOE),
]
NAMES = sorted({key for config in CONFIGS for key in config} | {key for s in SCALINGS for key in s})


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def around_itself(value):
    """A list or a dict that contains itself."""
    (value.append if isinstance(value, list) else lambda inner: value.update(head_dim=inner))(value)
    return value


HOSTILE = [
    *(None, True, False, 0, 1, 2, 3, -1, 63, 64, 128, 2**17, 2**28, 2**31 - 1, 2**31, 2**63, 2**64),
    *(10**18, 10**400, -(10**400), 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 64.0, 1e9, 1e15, 1e-15, 1e18, 1e39, 1e308, 5e-324, 1e-300, -1.0),
    *(math.nan, math.inf, -math.inf, complex(1, 1), 1 + 2**-52),
    *("", "x", "128", "1e4", "yarn", "dynamic", "longrope", "full_attention", "05", "-1", "\ud800"),
    *("\u0663", "a\nb\x1b[31m", "\N{SNOWMAN}" * 3, "x" * 100_000, b"yarn", b"\xff"),
    *([], [1], ["x"], [[]], [None], [math.nan] * 32, [1.0] * 48, ["full_attention"] * 6),
    *([0] * 100_000, (), (1, 2), {1}, frozenset(), range(2**60), object(), Ellipsis, int),
    *({}, {"a": {}}, {1: 2, "a": None}, {None: []}, {"05": {"head_dim": 8}}, {(): ()}),
    *(nested(900, lambda x: [x]), nested(900, lambda x: {"head_dim": x}), around_itself([])),
    *(around_itself({}), {"full_attention": {}, "sliding_attention": None}, torch.zeros(3)),
]
SMALL = st.integers(0, 300) | st.floats(-1e16, 1e16) | st.floats() | st.text(max_size=5)
VALUES = st.sampled_from(HOSTILE) | SMALL


def places(value):
    """Each value in nested dicts and lists, as its container and its key. Hostile values are left
    out, so that they stay the same for the next example.
    """
    if not isinstance(value, (dict, list)) or any(value is hostile for hostile in HOSTILE):
        return
    for key in list(value if isinstance(value, dict) else range(min(len(value), 50))):
        yield value, key
        yield from places(value[key])


@st.composite
def damaged(draw, originals):
    whole = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(whole))
        around, key = draw(st.sampled_from(found)) if found else (whole, "head_dim")
        damage = draw(st.sampled_from(["value", "value", "remove", "nest", "swap", "add", "scale"]))
        if damage == "value":
            around[key] = draw(VALUES)
        elif damage == "remove" and found:
            del around[key]
        elif damage == "nest" and found:
            inside = {draw(st.sampled_from(NAMES)): around[key]}
            around[key] = draw(st.sampled_from([inside, [around[key]]]))
        elif damage == "swap" and found:
            other, other_key = draw(st.sampled_from(found))
            around[key], other[other_key] = other[other_key], around[key]
        elif damage == "scale" and found and isinstance(around[key], float):
            around[key] *= draw(st.sampled_from([-1, 0.5, 2.0, 2.0**20, 1e200, 1e-20]))
        elif isinstance(around, dict):
            around[draw(st.sampled_from(NAMES))] = draw(VALUES)
    return whole


class SmallTensors(TorchDispatchMode):
    """Raises if a tensor is larger than the frequencies of the largest head."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            assert result.nbytes <= BYTES, f"{function} made {result.nbytes} bytes"
        return result


def timed(function, *args, **options):
    """Result and seconds of a call. A slow call is timed again: the first one may have imported a
    module, or run the garbage collector for the whole test process.
    """
    for _ in range(2):
        start = time.thread_time()
        result = function(*args, **options)
        spent = time.thread_time() - start
        if spent < SECONDS:
            break
    return result, spent


def answer(function, *args, **options):
    """The result of a call, or None for an error in the documented form; within the bounds."""
    (result, refusal, peak), spent = timed(traced, function, *args, **options)
    if refusal is not None:
        assert type(refusal) is ValueError, refusal
        assert FORM.fullmatch(str(refusal)), refusal
        assert len(str(refusal)) < 1500
    assert spent < SECONDS
    assert peak < BYTES
    return result


def traced(function, *args, **options):
    """The result of a call, its ValueError, and the peak memory of Python's objects."""
    result = refusal = None
    tracemalloc.start()
    try:
        with SmallTensors():
            result = function(*args, **options)
    except ValueError as error:
        refusal = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return result, refusal, peak


def assert_right(rope, inv_freq, attention_scaling, length=None):
    """Compares with the formulas in float64, or for ramps with their bounds."""
    channels, scaling, kind = rope.rotary_dim, rope.scaling or {}, rope_type_of(rope.scaling)
    assert inv_freq.dtype == torch.float32
    assert inv_freq.isfinite().all()
    assert type(attention_scaling) is float
    assert 0 < attention_scaling < math.inf
    if kind == "axial":
        return
    assert inv_freq.shape == (channels // 2,)

    def plain(base=rope.base):
        return float(base) ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)

    def stretched(alpha):
        return plain(rope.base * float(alpha) ** (channels / (channels - 2)))

    low = high = plain()
    original = scaling.get("original_max_position_embeddings") or rope.max_position_embeddings
    factor = scaling.get("factor")
    if kind in ("linear", "proportional"):
        low = high = plain() / (factor or 1)
    elif kind in ("ntk", "ntk_alpha"):
        low = high = stretched(scaling.get("alpha") or factor)
    elif kind == "dynamic":
        low = high = stretched(factor * max(length or 0, original) / original - (factor - 1))
    elif kind == "longrope":
        name = "long_factor" if (length or 0) > original else "short_factor"
        low = high = plain() / torch.tensor(scaling[name], dtype=torch.float64)
    elif kind in ("yarn", "llama3"):
        slowed = plain() / (factor or rope.max_position_embeddings / original)
        low, high = torch.minimum(slowed, plain()), torch.maximum(slowed, plain())
    if kind == "proportional":
        part = scaling.get("partial_rotary_factor")
        turning = int((1.0 if part is None else part) * channels // 2)
        low = high = torch.where(torch.arange(channels // 2) < turning, low, 0)
    assert (inv_freq >= low * (1 - RELATIVE)).all()
    assert (inv_freq <= high * (1 + RELATIVE)).all()


def check_examples(check, strategy, count):
    """Runs check on `count` examples, or on more until the time of numbered_cases.py is over."""
    bounds = settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for batch in numbers(count // BATCH):
        seed(batch)(bounds(given(strategy)(check)))()


def mostly(strategy):
    return st.integers(0, 7).flatmap(lambda n: VALUES if n == 0 else strategy)


LENGTHS = st.sampled_from([None, None, 0, 1, 5000, 2**31, 2**31 + 1, -1, 1.5, True, "1", 10**400])
LAYER_TYPES = st.sampled_from([None, None, *KINDS, *KINDS, "x\ny", ["full_attention"], 1, "\ud800"])


def test_config_has_the_right_frequencies_or_is_refused():
    found = Counter()

    def check(example):
        config, as_object, layer_type, length = example
        if as_object and isinstance(config, dict):
            config = SimpleNamespace(**config)
        options = {"layer_type": layer_type}
        got = answer(frequencies.from_config, config, length=length, **options)
        found["right" if got else "refused"] += 1
        if got is not None:
            assert_right(resolve(config, layer_type), *got, length)
        module = answer(RotaryEmbedding.from_config, config, **options)
        if module is not None:
            own = answer(frequencies.from_config, config, **options)
            assert torch.equal(module.inv_freq, own[0])
            assert module.attention_scaling == own[1]
        rope = answer(ModelRotation.of, config, layer_type)
        if rope is not None:
            assert 2 <= rope.trained <= rope.extended < 2**31

    as_object = st.sampled_from([False] * 5 + [True])
    strategy = st.tuples(mostly(damaged(CONFIGS)), as_object, LAYER_TYPES, LENGTHS)
    check_examples(check, strategy, 200)
    assert min(found["right"], found["refused"]) > 0


def test_scaling_has_the_right_frequencies_or_is_refused():
    found = Counter()

    def check(example):
        scaling, head_dim, rotary_dim, base, longest, length = example
        options = {"rotary_dim": rotary_dim, "max_position_embeddings": longest}
        base_if_any = {} if base is None else {"base": base}
        got = answer(
            frequencies.from_scaling, head_dim, scaling, length=length, **options, **base_if_any
        )
        found["right" if got else "refused"] += 1
        if got is not None:
            whole = rotary_dim is None or rope_type_of(scaling) == "proportional"
            rope = SimpleNamespace(
                rotary_dim=head_dim if whole else rotary_dim,
                base=10000.0 if base is None else base,
                scaling=scaling,
                max_position_embeddings=longest,
            )
            assert_right(rope, *got, length)
        module = answer(RotaryEmbedding, head_dim, scaling=scaling, base=base, **options)
        if module is not None:
            assert_right(module, module.inv_freq, module.attention_scaling)

    strategy = st.tuples(
        mostly(damaged(SCALINGS)),
        mostly(st.sampled_from([64, 96, 96, 96, 128])),
        mostly(st.none()),
        mostly(st.none()),
        mostly(st.sampled_from([None, 4096, 131072])),
        LENGTHS,
    )
    check_examples(check, strategy, 200)
    assert min(found["right"], found["refused"]) > 0


@st.composite
def damaged_text(draw):
    """A config.json, damaged in its values or in its bytes."""
    config = draw(damaged(CONFIGS))
    try:
        content = json.dumps(config, default=str, skipkeys=True).encode()
    except (ValueError, RecursionError):
        content = b"{}"
    for _ in range(draw(st.integers(0, 2))):
        at, until = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        between = draw(st.sampled_from([b"", b"[" * 9999, b"9" * 5000, b"1e999"]) | st.binary())
        content = content[:at] + between + content[until:]
    return content


def test_command_writes_a_page_or_one_line(tmp_path):
    found = Counter()
    path, out = tmp_path / "config.json", tmp_path / "page.html"

    def explored():
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
            status = main(["explore", "--config", str(path), "--out", str(out)])
        return status, shown.getvalue()

    def check(content):
        path.write_bytes(content)
        out.unlink(missing_ok=True)
        (status, shown), spent = timed(explored)
        assert spent < SECONDS
        found[status] += 1
        assert out.exists() == (status == 0)
        assert shown.count("\n") == (0 if status == 0 else 1)
        assert len(shown) < 1500

    check_examples(check, damaged_text(), 100)
    assert min(found[0], found[2]) > 0
