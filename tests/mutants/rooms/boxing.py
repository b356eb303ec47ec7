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
        "csrc/host/dispatcher_call.h", "test_wrong_arguments",
        ("arguments-after-the-wrong-one-leak", "if (taken_ >> i & 1) return;",
         "if (taken_ != 0) return;"),
    ),
    *mutants(
        "csrc/boxed.h", "test_wrong_arguments",
        ("arguments-of-a-failed-call-leak",
         "drop(call, kParameters);  // what was not taken", "// what was not taken"),
    ),
    # Calls that need the dispatcher go past it; a write is not seen; others wait for a long call.
    *mutants(
        "csrc/host/direct.cpp", "test_direct_calls",
        ("negated-tensors-are-direct", "is_true(pytorch.is_negative(each))", "false"),
        ("gradients-are-lost", "is_true(pytorch.requires_grad(args[i]))", "false"),
        ("modes-see-nothing", "if (is_true(condition())) return false;", "(void)condition;"),
        ("tangents-are-lost", "PyLong_AsLong(level) >= 0", "PyLong_AsLong(level) >= 9"),
        ("zeros-without-memory-are-read", "from.data == nullptr && view.numel() > 0", "false"),
        ("inference-tensors-are-written-directly", "return version != nullptr;", "return true;"),
        ("new-results-count-as-written", "!among(made_, made_count_) && ", ""),
        ("one-version-twice", " && !among(written_, written_count_)", ""),
        ("layouts-as-they-are", "std::swap(sizes[order->first], sizes[order->second]);", ""),
        ("others-wait", "if (is_long) thread_", "if (false) thread_"),
    ),
    # PyTorch does not know that k is written; a quantized tensor is not refused by name.
    *mutants(
        "csrc/schema.cpp", "test_in_place test_unusual_tensors test_every_operator",
        ("k-is-not-marked-as-written", '"apply_rotary_qk_(Tensor(a!) q, Tensor(b!) k,',
         '"apply_rotary_qk_(Tensor(a!) q, Tensor k,'),
        ("no-kernel-for-quantized-tensors", '{"CPU", "QuantizedCPU", "QuantizedCUDA"}', '{"CPU"}'),
    ),
]
