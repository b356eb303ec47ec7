"""Shared parts of the behaviour tests: random data, memory layouts, the exact result and the
allowed error.

Data are made on the CPU and moved, so they are the same on every device; results are compared on
the CPU.
"""

import contextlib
import platform
import warnings
from functools import partial
from itertools import combinations, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rope_ext import _C, reference
from rope_ext._engine import fallback
from rope_ext._operators import OPERATORS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The sets of CPU kernels: a processor that runs one runs those before it.
CPU_CODE = "portable", "avx2", "avx512"
if platform.machine() == "aarch64":
    CPU_CODE = "portable", "arm_bf16"
# The order of the pairs in x and in the result.
ORDERS = {
    "half-split": {},
    "interleaved": {"interleaved": True},
    "neighbours to halves": {"interleaved": True, "interleaved_out": False},
    "halves to neighbours": {"interleaved": False, "interleaved_out": True},
}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- cases


def pairwise(**values):
    """Cases (pytest.param) in which each value of a parameter meets each value of every other one:
    about as many as the two longest parameters multiply to. The keys of a dict name its values.

    Each case takes the first pair that is missing, then the values that complete most pairs.
    """
    values = {p: v if isinstance(v, dict) else {_id(p, x): x for x in v} for p, v in values.items()}
    missing = dict.fromkeys(  # in order, unlike a set
        frozenset([(p, a), (q, b)])
        for p, q in combinations(values, 2)
        for a, b in product(values[p], values[q])
    )

    def completed(case, option):
        return sum(frozenset([option, other]) in missing for other in case.items())

    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for p in [p for p in values if p not in case]:
            options = [(p, a) for a in values[p]]
            case |= [max(options, key=partial(completed, case))]
        for pair in combinations(case.items(), 2):
            missing.pop(frozenset(pair), None)
        cases.append(
            pytest.param(
                *(v[case[p]] for p, v in values.items()), id="-".join(case[p] for p in values)
            )
        )
    return cases


def _id(parameter, value):
    if isinstance(value, torch.dtype):
        return name_of(value)
    return value if isinstance(value, str) else f"{parameter}={value}"


# ---- data


def guarded(*shape, dtype, device, guard=16):
    """A dense tensor inside a larger one with known values, and the larger one."""
    count = torch.Size(shape).numel()
    whole = random(guard + count + guard, dtype=dtype, device=device, seed=3)
    return whole[guard : guard + count].view(shape), whole


def small_llama(layers):
    """A Llama with grouped heads in float32, small enough to run in milliseconds."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # large enough for the tokens to depend on their positions
    )
    return transformers.LlamaForCausalLM(config).eval()


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def random_positions(*shape, rows, dtype=torch.int64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rows, shape, generator=generator, dtype=dtype).to(device)


def random_table(*shape, dtype=torch.float32, device="cpu", seed=0):
    """cos and sin of random angles, so cos^2 + sin^2 = 1 up to rounding."""
    angle = 3 * random(*shape, dtype=torch.float64, seed=seed + 1)
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def random_slots(*shape, capacity, dtype=torch.int64, device="cpu", seed=0):
    """Unique slots of a cache in random order; every fourth token has none."""
    count = torch.Size(shape).numel()
    slots = torch.randperm(capacity, generator=torch.Generator().manual_seed(seed))[:count].clone()
    slots[3::4] = torch.tensor([-1, -2, -(2**31)])[torch.arange(len(slots[3::4])) % 3]
    return slots.to(dtype).view(shape).to(device)


def random_cache(*shape, dtype, device="cpu", seed=5):
    return random(*shape, dtype=torch.float32, seed=seed).to(dtype).to(device)


def in_layout(x, layout):
    """x [B, S, H, D] as a dense tensor of the layout."""
    swap = {"bshd": (0, 0), "bhsd": (1, 2), "sbhd": (0, 1), "thd": (0, 0)}[layout]
    return x.transpose(*swap).contiguous()


# Memory layouts: each makes a view [B, S, H, D] from `base(*shape)`, a new dense tensor.
VIEWS = {
    "dense": lambda base, B, S, H, D: base(B, S, H, D),
    "bhsd": lambda base, B, S, H, D: base(B, H, S, D).transpose(1, 2),
    "sbhd": lambda base, B, S, H, D: base(S, B, H, D).transpose(0, 1),
    "heads outermost": lambda base, B, S, H, D: base(H, B, S, D).permute(1, 2, 0, 3),
    "packed qkv": lambda base, B, S, H, D: base(B, S, 3, H, D)[:, :, 1],
    "packed qkv, bhsd": lambda base, B, S, H, D: base(3, B, H, S, D)[2].transpose(1, 2),
    "some of the heads": lambda base, B, S, H, D: base(B, S, H + 5, D)[:, :, 2 : 2 + H],
    "q of each head's qkv": lambda base, B, S, H, D: base(B, S, H, 3 * D)[..., D : 2 * D],
    "every second": lambda base, B, S, H, D: base(2 * B, 2 * S, 2 * H, D)[::2, 1::2, ::2],
    "rows of odd length": lambda base, B, S, H, D: base(B, S, H, D + 1)[..., :D],
    "one element off": lambda base, B, S, H, D: base(B * S * H * D + 1)[1:].view(B, S, H, D),
    "part of a long sequence": lambda base, B, S, H, D: base(B, S + 7, H, D)[:, 3 : 3 + S],
}


# ---- the exact answer


def assert_same_bits(got, expected, case=""):
    """The same shape, dtype and bits, the sign of zero included; any NaN equals any NaN."""
    got, expected = got.detach().cpu(), expected.detach().cpu()
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), case
    nan = _is_nan(expected)
    assert torch.equal(_is_nan(got), nan), f"NaN: {case}"
    as_int = BITS[got.element_size()]
    a, b = (t.contiguous().view(as_int).masked_fill(nan, 0) for t in (got, expected))
    if not torch.equal(a, b):
        at = (a != b).nonzero()
        first = tuple(at[0].tolist())
        raise AssertionError(
            f"{case or 'bits'}: {len(at)} of {a.numel()} elements differ, the first at {first}: "
            f"got {got[first].item()!r}, expected {expected[first].item()!r}"
        )


def _is_nan(t):
    return (t.float() if t.element_size() == 1 else t).isnan()


def on_cpu(tensors, dtype=None):
    """The tensors on the CPU; the floating ones, if dtype is given, in that dtype."""
    tensors = [t if t is None else t.detach().cpu() for t in tensors]
    if dtype is None:
        return tensors
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def rounded_once(x, cos, sin, position_ids=None, **options):
    """Plain PyTorch in the dtype of the arithmetic (float64 for float64, else float32), then one
    rounding to x's dtype. The operators have the same bits.
    """
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_, cos, sin, position_ids = on_cpu([x, cos, sin, position_ids], arithmetic)
    return reference.apply_rotary(x_, cos, sin, position_ids, **options).to(x.dtype)


def inverse_of(options):
    """The options of the inverse rotation, which is the backward."""
    back = {**options, "inverse": not options.get("inverse", False)}
    if options.get("interleaved_out") is not None:
        back["interleaved"] = options["interleaved_out"]
        back["interleaved_out"] = options.get("interleaved", False)
    return back


def error_of(function, *arguments, **options):
    """The message of the ValueError that the call raises, or "no error"."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def assert_near_exact(got, x, cos, sin, position_ids=None, **options):
    """|got - exact| <= 0.5 ulp(exact) + 2^-23 (|x1 c| + |x2 s|), elementwise, for x below float64.

    One evaluation in float32 rounds two products and a sum, each by at most 2^-24 of its value, so
    by 2^-23 (|x1 c| + |x2 s|) together; then one rounding to x's dtype. A float64 table counts as
    rounded to float32, the dtype of the arithmetic. Channels that do not rotate have to be equal.
    """
    cos, sin = (t.float() if t.dtype == torch.float64 else t for t in (cos, sin))
    x, cos, sin, position_ids = on_cpu([x, cos, sin, position_ids], torch.float64)
    exact = reference.apply_rotary(x, cos, sin, position_ids, **options)
    # |x1 c| + |x2 s| in every channel: the rotation by (|c|, |s|) whose sines add in both channels
    plus = reference.apply_rotary(x.abs(), cos.abs(), sin.abs(), position_ids, **options)
    minus = reference.apply_rotary(x.abs(), cos.abs(), -sin.abs(), position_ids, **options)
    allowed = 0.5 * ulp(exact, got.dtype) + 2.0**-23 * torch.maximum(plus, minus)
    first, dim = options.get("rotary_offset", 0), options.get("rotary_dim") or 2 * cos.shape[-1]
    allowed[..., :first] = allowed[..., first + dim :] = 0
    error = (got.detach().cpu().double() - exact).abs()
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"element {worst}: error {error.flatten()[worst]:.3g}, "
        f"allowed {allowed.flatten()[worst]:.3g}"
    )


def ulp(exact, dtype):
    """The distance between neighbours of dtype at the float64 values `exact`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs()).exponent
    spacing = torch.ldexp(torch.ones_like(exact), exponent - 1) * info.eps
    return spacing.clamp_min(info.smallest_normal * info.eps)


def assert_derivatives(function, inputs):
    """First and second derivatives in float64 against differences, in random directions. On the CPU
    also forward, forward over backward, and each under vmap: these derivatives consist of the same
    operators on every device.
    """
    first = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    forward, twice = {}, {}
    if first.device.type == "cpu":
        forward = {"check_batched_grad": True, "check_forward_ad": True}
        forward |= {"check_batched_forward_grad": True}
        twice = {"check_batched_grad": True, "check_fwd_over_rev": True}
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, **forward)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, **twice)


@contextlib.contextmanager
def naming(case):
    """An error in the block names the case: for a loop over cases in one test."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"{case}: {error}") from error


@contextlib.contextmanager
def cpu_without_kernels():
    """The CPU as a device that rope_ext has no kernels for."""
    library = torch.library.Library("rope", "IMPL")
    direct = _C.use_direct_calls(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        fallback.register_at("CPU", OPERATORS, library)
    fallback.announced.add("cpu")
    yield
    library._destroy()
    fallback.with_kernels.add("cpu")
    fallback.announced.discard("cpu")
    _C.use_direct_calls(direct)


class LargeTensors(TorchDispatchMode):
    """Records the operations that make a tensor of at least `size` elements."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.made_by = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        storages = {
            x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, torch.Tensor)
        }
        for y in tree_leaves(results):
            large = isinstance(y, torch.Tensor) and y.numel() >= self.size
            if large and y.untyped_storage()._cdata not in storages:
                self.made_by.append(str(function))
        return results
