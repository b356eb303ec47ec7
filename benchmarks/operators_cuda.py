"""The cases of the GPU benchmark: every operator of torch.ops.rope, in prefill and in decode."""

import torch
from caches_cuda import append_kv, mla_append, normed_append, shift
from norms_cuda import norm, norm_backward
from operator_case import OperatorCase, operator_name
from rotations_cuda import llama, neox, rotation, rotation_at
from tables_cuda import backward, rows, table_backward, whole_table

rope = torch.ops.rope

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
PREFILL, DECODE = 4096, (1, 64, 256)  # tokens
LONG_PREFILL, TABLE = 32768, 131072
QUICK = {PREFILL: 8, LONG_PREFILL: 12, TABLE: 32, 1: 1, 64: 2, 256: 3}


def cases(quick: bool) -> list[OperatorCase]:
    """quick: all cases with few tokens."""

    def size(tokens: int) -> int:
        return QUICK[tokens] if quick else tokens

    prefill = llama("prefill", size(PREFILL))
    interleaved = llama("prefill", size(PREFILL), interleaved=True)
    partial = neox(size(PREFILL) // 2)
    long = llama("prefill", size(LONG_PREFILL))
    new, in_place = rope.apply_rotary_qk.default, rope.apply_rotary_qk_.default
    at, at_ = rope.apply_rotary_qk_at.default, rope.apply_rotary_qk_at_.default
    one, some, many = (size(tokens) for tokens in DECODE)
    return [
        rotation(rope.apply_rotary.default, "bf16", prefill, BF16),
        rotation(rope.apply_rotary_.default, "bf16", prefill, BF16),
        rotation(rope.apply_rotary.out, "bf16", prefill, BF16),
        rotation(new, "bf16", prefill, BF16, compiled=True),
        rotation(in_place, "bf16", prefill, BF16),
        rotation(rope.apply_rotary_qk.out, "bf16", prefill, BF16),
        rotation(new, "bf16, interleaved", interleaved, BF16, compiled=True),
        rotation(in_place, "bf16, interleaved", interleaved, BF16),
        rotation(new, "bf16, 24 of 96 channels", partial, BF16, compiled=True),
        rotation(in_place, "bf16, 24 of 96 channels", partial, BF16),
        rotation(new, "fp32", prefill, FP32),
        rotation(in_place, "fp32", prefill, FP32),
        rotation(new, "bf16", long, BF16),
        rotation(in_place, "bf16", long, BF16),
        rotation_at(at, "bf16", prefill, BF16, compiled=True),
        rotation_at(at, "bf16, axes", prefill, BF16, axes=True),
        rotation_at(at_, "bf16", prefill, BF16),
        whole_table("fp32", size(TABLE)),
        rows("fp32", "prefill", size(PREFILL)),
        rows("fp32, axes", "prefill", size(PREFILL), axes=True),
        backward("fp32, positions", size(PREFILL), positions=True),
        backward("fp32, table", size(TABLE), positions=False),
        table_backward("bf16", size(PREFILL), positions=False),
        table_backward("bf16, positions", size(PREFILL), positions=True),
        append_kv("bf16", "prefill", size(PREFILL), BF16, compiled=True),
        append_kv("bf16, float8 cache", "prefill", size(PREFILL), FP8, compiled=True),
        normed_append("bf16", "prefill", size(PREFILL), BF16),
        normed_append(
            "bf16, v normalised, float8 cache", "prefill", size(PREFILL), FP8, norm_v=True
        ),
        mla_append("bf16", "prefill", size(PREFILL), BF16, compiled=True),
        mla_append("bf16, float8 cache", "prefill", size(PREFILL), FP8),
        shift("bf16", "prefill", size(PREFILL), BF16),
        shift("bf16, float8 cache", "prefill", size(PREFILL), FP8),
        norm("bf16, weights [D]", "prefill", size(PREFILL), all_heads=False, compiled=True),
        norm("bf16, weights [H, D]", "prefill", size(PREFILL), all_heads=True),
        norm_backward("bf16, weights [D]", "prefill", size(PREFILL), False, compiled=True),
        norm_backward("bf16, weights [H, D]", "prefill", size(PREFILL), True),
        rotation(new, "bf16", llama("decode", some), BF16, compiled=True),
        *(rotation(in_place, "bf16", llama("decode", n), BF16) for n in (one, some, many)),
        rotation(in_place, "fp32", llama("decode", some), FP32),
        *(rotation_at(at_, "bf16", llama("decode", n), BF16) for n in (one, some)),
        *(rows("fp32", "decode", n) for n in (some, many)),
        *(append_kv("bf16", "decode", n, BF16, compiled=n == some) for n in (one, some, many)),
        append_kv("bf16, float8 cache", "decode", some, FP8),
        *(normed_append("bf16", "decode", n, BF16) for n in (one, some)),
        *(mla_append("bf16", "decode", n, BF16) for n in (one, some)),
        mla_append("bf16, float8 cache", "decode", some, FP8),
        *(norm("bf16, weights [D]", "decode", n, all_heads=False) for n in (one, some)),
        norm("bf16, weights [H, D]", "decode", some, all_heads=True),
    ]


def without_case(given: list[OperatorCase]) -> list[str]:
    """The operators of torch.ops.rope that none of the cases times."""
    registered = {
        name.removeprefix("rope::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("rope::")
    }
    return sorted(registered - {operator_name(case.operator) for case in given})
