"""Schemas, packs of parameters, and the way from PyTorch's stack to C++."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # Calls that leave a keyword out get another rotation or norm.
    *mutants(
        "csrc/packs.h", "test_apply_rotary test_every_operator test_rms_norm_rotary",
        ("interleaved-by-default", '"bool interleaved=False"', '"bool interleaved=True"'),
        ("halves-out-by-default", "interleaved_out.value_or(interleaved)",
         "interleaved_out.value_or(false)"),
        ("another-eps-by-default", "float eps=1e-6", "float eps=1e-5"),
        ("offset-of-2-by-default", '"int rotary_offset=0"', '"int rotary_offset=2"'),
    ),
    # Tensors of a call that fails are never freed.
    *mutants(
        "csrc/boxed.h", "test_wrong_arguments",
        ("arguments-after-the-wrong-one-leak", "if (taken >> i & 1) return;",
         "if (taken != 0) return;"),
        ("arguments-of-a-failed-call-leak",
         "release(stack, kParameters);  // what was not taken", "// what was not taken"),
    ),
    # PyTorch does not know that k is written; a quantized tensor is not refused by name.
    *mutants(
        "csrc/schema.cpp", "test_in_place test_unusual_tensors test_every_operator",
        ("k-is-not-marked-as-written", '"apply_rotary_qk_(Tensor(a!) q, Tensor(b!) k,',
         '"apply_rotary_qk_(Tensor(a!) q, Tensor k,'),
        ("no-kernel-for-quantized-tensors", '{"CPU", "CUDA", "QuantizedCPU", "QuantizedCUDA"}',
         '{"CPU", "CUDA"}'),
    ),
]
