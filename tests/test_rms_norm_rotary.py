"""RMSNorm of q and k and their rotation in one pass: results and gradients as exact as one final
rounding allows, for all strides, and compared with models.
"""

import pytest
import torch
from normed_inputs import (
    B,
    Case,
    L,
    S,
    assert_close,
    gradients,
    in_float64,
    inputs_of,
    normalised,
    roundings,
    sizes_of,
)
from support import (
    DTYPES,
    VIEWS,
    assert_same_bits,
    in_layout,
    naming,
    on_cpu,
    random,
    random_table,
)

import rope_ext
from rope_ext import reference

rope = torch.ops.rope

F64, F32, F16, BF16 = DTYPES

CASES = [
    # models
    Case("qwen 3", "norms kept in float32", D=128, dtype=BF16, weight_dtype=F32),
    Case("gemma 3", "1 + weight, 256 channels", K=1, D=256, dtype=BF16, unit_offset=True),
    Case("olmo 2, grouped heads", "rows of q and k of two lengths", H=6, K=2, D=64, all_heads=True),
    Case("olmo 2 13B", "a row longer than a block of threads holds", H=40, K=40, D=128,
         dtype=F16, all_heads=True, batch=1),
    Case("float64", "arithmetic in float64", dtype=F64, table_dtype=F64, D=72),
    Case("float64, float32 weights", "widened", dtype=F64, weight_dtype=F32, unit_offset=True),
    # sizes
    Case("one head", "nothing else to normalise with", H=1, K=1, D=64),
    Case("20 channels", "no whole vectors of 8; a row is the head", H=1, K=1, D=20, dtype=BF16,
         all_heads=True),
    Case("6 channels", "less than a vector", D=6, dtype=F16, weight_dtype=F32, unit_offset=True),
    Case("29 channels, 18 rotate", "parts of vectors before, in and after the pairs", D=29, R=18,
         offset=3, dtype=BF16, all_heads=True),
    Case("512 channels", "a head of two warps or one", D=512, K=1, dtype=F32),
    Case("2100 channels", "several pieces of a head, and of the table", H=2, K=1, D=2100, batch=1),
    Case("2100 channels, 1100 stay", "several pieces that stay", H=2, K=1, D=2100, R=1000,
         offset=1050, batch=1, interleaved=True),
    # rotations and positions
    Case("partial", "a quarter rotates, all is normalised", D=64, R=16, dtype=BF16, ids="BS"),
    Case("last channels", "none after them", D=48, R=16, offset=32, ids="S"),
    Case("interleaved", "neighbours", D=64, interleaved=True, dtype=BF16),
    Case("interleaved, some stay", "neighbours between others", D=40, R=20, offset=7,
         interleaved=True, all_heads=True, table="per token", table_dtype=BF16),
    Case("neighbours to halves", "another order in the result", D=64, R=32, offset=16,
         interleaved=True, interleaved_out=False, dtype=BF16, ids="T", packed=True),
    Case("halves to neighbours", "the other way", D=64, interleaved_out=True, dtype=F16,
         all_heads=True, packed=True),
    Case("halves to neighbours, ragged", "in parts of vectors", D=22, interleaved_out=True),
    Case("inverse", "the way back of a rotation", D=32, inverse=True, table="one for all"),
    Case("full width", "one angle a channel", D=32, R=32, W=32, eps=0.5),
    Case("full width, inverse, neighbours to halves", "the transpose", D=24, R=20, W=20,
         inverse=True, interleaved=True, interleaved_out=False, dtype=BF16),
]  # fmt: skip
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cases
def test_one_rounding_from_the_exact_result(case, device):
    tensors = inputs_of(case, device)
    got = rope.rms_norm_rotary_qk(*tensors, **case.options)
    q, k, q_weight, k_weight, *rows = in_float64(tensors, case.dtype)
    exact = reference.rms_norm_rotary_qk(q, k, q_weight, k_weight, *rows, **case.options)
    for name, y, z, x, weight in zip("qk", got, exact, (q, k), (q_weight, k_weight), strict=True):
        assert y.shape == x.shape
        assert y.dtype == case.dtype
        n, _, factor = normalised(x, weight, case)
        size = sizes_of(n * factor, weight, rows, case)
        assert_close(y, z, size, roundings(case, x), name)


@cases
def test_gradients_are_near_the_exact_ones(case, device):
    """To x: g w / rms and n mean(n g w) / rms; each term is within the roundings of its factors, of
    the sum over the row (N), and of 8 more. To the weights: a sum of n g over the tokens, and over
    the heads if these share the weight.
    """
    tensors = inputs_of(case, device)
    seeds = [random(*x.shape, dtype=case.dtype, device=device, seed=9) for x in tensors[:2]]
    got = gradients(case, tensors, seeds)
    *leaves, cos, sin, ids = in_float64(tensors, case.dtype)
    leaves = [t.requires_grad_() for t in leaves]
    outputs = reference.rms_norm_rotary_qk(*leaves, cos, sin, ids, **case.options)
    seeds = on_cpu(seeds, F64)
    exact = torch.autograd.grad(outputs, leaves, seeds)
    leaves = [t.detach() for t in leaves]
    options = {"rotary_dim": case.R, "rotary_offset": case.offset, "inverse": not case.inverse}
    order = case.interleaved if case.interleaved_out is None else case.interleaved_out
    options.update(interleaved=order, interleaved_out=case.interleaved)
    for i, name in enumerate("qk"):
        x, weight, seed = leaves[i], leaves[2 + i], seeds[i].abs()
        n, inverse_rms, factor = (t.abs() for t in normalised(x, weight, case))
        g = torch.maximum(*(
            reference.apply_rotary(seed, cos.abs(), sign * sin.abs(), ids, **options).abs()
            for sign in (1, -1)
        ))  # fmt: skip
        row = (-1,) if weight.dim() == 1 else (-2, -1)
        size = inverse_rms * (g * factor + n * (n * g * factor).mean(row, keepdim=True))
        rounding = 2 * roundings(case, x) + 8 * 2.0**-24 * (case.dtype != F64)
        assert got[i].shape == x.shape
        assert_close(got[i], exact[i], size, 2 * rounding, name)
        summed = tuple(range(x.dim() - weight.dim()))
        terms = x.numel() // weight.numel()
        unit = 2.0**-24 if case.dtype != F64 else 2.0**-52
        allowed = rounding + terms * unit
        assert got[2 + i].dtype == tensors[2 + i].dtype
        assert_close(got[2 + i], exact[2 + i], (n * g).sum(summed), allowed, f"{name}_weight")


def test_one_tensor_in_place_and_into_out_have_the_bits_of_both(device):
    """On CUDA, a norm over all heads of k has fewer lanes than beside a longer one of q: it adds in
    another order.
    """
    for case in CASES:
        q, k, q_weight, k_weight, *rows = inputs_of(case, device)
        seeds = [random(*x.shape, dtype=case.dtype, device=device, seed=9) for x in (q, k)]
        tensors = [q, k, q_weight, k_weight, *rows]
        expected = rope.rms_norm_rotary_qk(*tensors, **case.options)
        to_q, to_k, *to_weights = rope.rms_norm_rotary_qk_backward(*seeds, *tensors, **case.options)
        options = dict(case.options)
        may_be_in_place = options["interleaved_out"] in (None, options["interleaved"])
        of_q, of_k = (q, q_weight, expected[0], seeds[0], (to_q, to_weights[0])), (
            k, k_weight, expected[1], seeds[1], (to_k, to_weights[1])
        )  # fmt: skip
        compared = [of_q] if case.all_heads and device.type == "cuda" else [of_q, of_k]
        with naming(case.name):
            for x, weight, y, seed, to in compared:
                assert_same_bits(rope.rms_norm_rotary(x, weight, *rows, **options), y)
                one, out = x.clone(), torch.full_like(x, torch.nan)
                rope.rms_norm_rotary.out(x, weight, *rows, **options, out=out)
                assert_same_bits(out, y)
                grads = rope.rms_norm_rotary_backward(seed, x, weight, *rows, **options)
                for a, b in zip(grads, to, strict=True):
                    assert_same_bits(a, b)
                if may_be_in_place:
                    rope.rms_norm_rotary_(one, weight, *rows, **options)
                    assert_same_bits(one, y)
            outs, both = [torch.full_like(x, torch.nan) for x in (q, k)], [q.clone(), k.clone()]
            out_q, out_k = outs
            rope.rms_norm_rotary_qk.out(*tensors, **options, out_q=out_q, out_k=out_k)
            if may_be_in_place:
                rope.rms_norm_rotary_qk_(*both, *tensors[2:], **options)
                outs += both
            for a, b in zip(outs, expected * 2, strict=False):
                assert_same_bits(a, b)


def test_vectors_have_the_bits_of_the_portable_code(vector_code):
    for case in CASES:
        tensors = inputs_of(case, "cpu")
        seeds = [random(*x.shape, dtype=case.dtype, seed=9) for x in tensors[:2]]
        results = []
        for kernels in (vector_code, "portable"):
            rope_ext._C.set_cpu_capability(kernels)
            forward = rope.rms_norm_rotary_qk(*tensors, **case.options)
            results.append([*forward, *gradients(case, tensors, seeds)])
        for a, b in zip(*results, strict=True):
            with naming(case.name):
                assert_same_bits(a, b)


def test_one_token_a_sequence_has_a_row_of_its_own(device):
    q, k, *others = inputs_of(Case("", ""), device)
    *others, _ = others
    ids = torch.tensor([[3], [7]]).to(device)
    packed = rope.rms_norm_rotary_qk(q[:, 0], k[:, 0], *others, ids[:, 0])
    for a, b in zip(rope.rms_norm_rotary_qk(q[:, :1], k[:, :1], *others, ids), packed, strict=True):
        assert_same_bits(a[:, 0], b)


# ---- memory


@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_no_bit(view, device):
    """Strides of q, k, incoming gradients and weights; k has a separate layout. On CUDA, unaligned
    addresses change the order of sums over lanes: there, almost no bits differ.
    """

    def strided(x):
        def base(*shape):
            return torch.full(shape, torch.nan, dtype=x.dtype).to(device)

        return VIEWS[view](base, *x.shape).copy_(x)

    def in_columns(weight):
        wide = torch.full((*weight.shape[:-1], 40), torch.nan, dtype=weight.dtype).to(device)
        return wide[..., 3:35].copy_(weight)

    for all_heads in (False, True):
        case = Case("", "", D=32, dtype=BF16, all_heads=all_heads)
        q, k, *others = inputs_of(case, device)
        seeds = [random(*x.shape, dtype=BF16, device=device, seed=9) for x in (q, k)]
        results = []
        for tensors, given in (
            ((q, k, *others), seeds),
            ((strided(q), strided(k), *map(in_columns, others[:2]), *others[2:]),
             [strided(seed) for seed in seeds]),
        ):  # fmt: skip
            results.append([*rope.rms_norm_rotary_qk(*tensors), *gradients(case, tensors, given)])
        for a, b in zip(*results, strict=True):
            if device.type == "cpu":
                assert_same_bits(a, b)
            else:
                torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
def test_function_takes_every_layout(layout, device):
    q, k, *others = inputs_of(Case("", "", packed=layout == "thd"), device)
    options = {"unit_offset": True, "eps": 1e-9}
    q, k = q * 1e-4, k * 1e-4  # eps counts
    expected = rope.rms_norm_rotary_qk(q, k, *others, **options)
    if layout != "thd":
        q, k = in_layout(q, layout), in_layout(k, layout)
    expected = [b if layout == "thd" else in_layout(b, layout) for b in expected]
    options["layout"] = layout
    q_weight, _, *rows = others
    out, one, in_place = (
        (torch.empty_like(q), torch.empty_like(k)),
        torch.empty_like(q),
        [q.clone(), k.clone(), q.clone()],
    )
    for got in (
        rope_ext.rms_norm_rotary_qk(q, k, *others, **options),
        rope_ext.rms_norm_rotary_qk(q, k, *others, **options, out=out),
        rope_ext.rms_norm_rotary_qk(*in_place[:2], *others, **options, inplace=True),
        [rope_ext.rms_norm_rotary(q, q_weight, *rows, **options)],
        [rope_ext.rms_norm_rotary(q, q_weight, *rows, **options, out=one)],
        [rope_ext.rms_norm_rotary(in_place[2], q_weight, *rows, **options, inplace=True)],
        out,
        [one],
        in_place[:2],
        in_place[2:],
    ):
        for a, b in zip(got, expected, strict=False):
            assert_same_bits(a, b)


@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_sizes_of_zero(all_heads, device):
    """Unused weights have a gradient of zero."""
    for shape in ((0, 5, 4), (2, 0, 4), (2, 5, 0)):
        q, k = random(*shape, 16, device=device), random(*shape[:2], 2, 16, device=device)
        weights = (random(*((x.shape[2],) if all_heads else ()), 16, device=device) for x in (q, k))
        tensors = [q, k, *weights, *random_table(L, 8, device=device), None]
        for x, y in zip((q, k), rope.rms_norm_rotary_qk(*tensors), strict=True):
            assert y.shape == x.shape
        got = gradients(Case("", ""), tensors, [random(*x.shape, device=device) for x in (q, k)])
        assert [grad.shape for grad in got] == [x.shape for x in tensors[:4]]
        assert not got[2].cpu().any()
        assert bool(got[3].cpu().any()) == (shape[2] == 0)


# ---- special values


def test_row_of_zeros(device):
    for dtype in DTYPES:
        q, k, *others = inputs_of(Case("", "", dtype=dtype), device)
        q[0, 1, 2] = 0
        out, _ = rope.rms_norm_rotary_qk(q, k, *others)
        assert not out[0, 1, 2].cpu().any(), dtype
        out, _ = rope.rms_norm_rotary_qk(q, k, *others, eps=0.0)  # 0 / 0, as in PyTorch
        nan = out.cpu().isnan()
        assert nan[0, 1, 2].all(), dtype
        assert nan.sum() == q.shape[-1], dtype


@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_infinity_and_nan_stay_in_their_row(all_heads, device):
    for value in (float("inf"), float("nan")):
        q, k, *others = inputs_of(Case("", "", all_heads=all_heads), device)
        expected = rope.rms_norm_rotary_qk(q, k, *others)[0].cpu()
        q[1, 2, 3, 4] = value
        got = rope.rms_norm_rotary_qk(q, k, *others)[0].cpu()
        row = (1, 2) if all_heads else (1, 2, 3)
        assert got[row].isnan().any()
        got[row] = expected[row] = 0
        assert_same_bits(got, expected)


@pytest.mark.cuda
def test_position_outside_of_the_table_gives_nan_on_cuda():
    q, k, *others = inputs_of(Case("", ""), "cuda")
    others[-1] = torch.tensor([0, 1, L, 3, 4]).cuda()
    for out in rope.rms_norm_rotary_qk(q, k, *others):
        nan = out.cpu().isnan()
        assert nan[:, 2].all()
        assert nan.sum() == nan[:, 2].numel()


# ---- the same bits in every run


def many_tokens(device, all_heads):
    case = Case("", "", H=6, D=64, all_heads=all_heads)
    q, k = (random(2, 300, heads, 64, device=device) for heads in (6, 2))
    weights = inputs_of(case, device)[2:4]
    tensors = [q, k, *weights, *random_table(300, 32, device=device), None]
    seeds = [random(*x.shape, device=device, seed=5) for x in (q, k)]
    return *rope.rms_norm_rotary_qk(*tensors), *gradients(case, tensors, seeds)


@pytest.mark.parametrize("all_heads", [False, True], ids=["[D]", "[H, D]"])
def test_runs_and_numbers_of_threads_have_the_same_bits(all_heads, device, threads):
    threads(1)
    expected = many_tokens(device, all_heads)
    for count in (1, 2, 3):
        threads(count)
        for a, b in zip(expected, many_tokens(device, all_heads), strict=True):
            assert_same_bits(a, b)


# ---- models


def attention_of(family):
    """A layer's q_norm, k_norm, whether a row is all heads, and the rotation of its model."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "Qwen3":
        from transformers.models.qwen3 import modeling_qwen3 as module

        attention = module.Qwen3Attention(transformers.Qwen3Config(**sizes), 0)
    elif family == "Gemma3":
        from transformers.models.gemma3 import modeling_gemma3 as module

        attention = module.Gemma3Attention(transformers.Gemma3TextConfig(**sizes), 0)
    else:
        from transformers.models.olmo2 import modeling_olmo2 as module

        attention = module.Olmo2Attention(transformers.Olmo2Config(**sizes), 0)
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight)
    return attention, module.apply_rotary_pos_emb


@pytest.mark.parametrize(
    ("family", "dtype"), [("Qwen3", F32), ("Gemma3", BF16), ("Olmo2", F32), ("Olmo2", BF16)]
)
@torch.no_grad()
def test_norms_and_rotation_of_models(family, dtype):
    """In float32 the model's own results are as exact as one rounding and these roundings allow. In
    bfloat16 they round more often, and are less exact on average.
    """
    attention, apply_rotary_pos_emb = attention_of(family)
    attention = attention.to(dtype)
    all_heads = family == "Olmo2"
    case = Case("", "", all_heads=all_heads, unit_offset=family == "Gemma3", eps=1e-5, dtype=dtype)
    hidden = random(B, S, 64, dtype=dtype)
    cos, sin = random_table(S, 8)
    full = [torch.cat((t, t), -1)[None].to(dtype) for t in (cos, sin)]
    q, k = attention.q_proj(hidden), attention.k_proj(hidden)
    if all_heads:
        own_q, own_k = attention.q_norm(q), attention.k_norm(k)
        own_q, own_k = (t.view(B, S, -1, 16) for t in (own_q, own_k))
    q, k = q.view(B, S, -1, 16), k.view(B, S, -1, 16)
    weights = [norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)]
    if all_heads:
        weights = [w.view(-1, 16) for w in weights]
    else:
        own_q, own_k = attention.q_norm(q), attention.k_norm(k)
    own = apply_rotary_pos_emb(own_q.transpose(1, 2), own_k.transpose(1, 2), *full)
    own = [t.transpose(1, 2) for t in own]

    got = rope_ext.rms_norm_rotary_qk(
        q, k, *weights, *full, eps=case.eps, unit_offset=case.unit_offset, rotary_dim=16
    )
    q, k, *rest = on_cpu([q, k, *weights, *(t[..., :8] for t in full)], F64)
    options = {"eps": case.eps, "unit_offset": case.unit_offset}
    exact = reference.rms_norm_rotary_qk(q, k, *rest, **options)
    for name, x, w, ours, theirs, truth in zip(
        "qk", (q, k), rest[:2], got, own, exact, strict=True
    ):
        n, _, factor = normalised(x, w, case)
        size = sizes_of(n * factor, w, (*rest[2:], None), case)
        assert_close(ours, truth, size, roundings(case, x), name)
        if dtype == F32:
            assert_close(theirs, truth, size, roundings(case, x), f"{name} of {family}")
        else:
            assert (ours - truth).abs().mean() < (theirs - truth).abs().mean()
