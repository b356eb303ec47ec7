// librope, the operators without Python, registers them as soon as it is loaded.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>

#include "operators.h"
#include "refusal.h"

namespace {

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

// What PyTorch does for tensors that negate their elements as these are read, as those of
// imag(conj(z)) do, needs a result to copy back to one that is written. Refused, before anything
// is; in Python, rope_ext/_engine/negative_and_zero_tensors.py refuses those alone that are
// written.
template <const auto& kName, auto kFunction>
struct WithNegative;

template <const auto& kName, class... Args, void (*kFunction)(Args...)>
struct WithNegative<kName, kFunction> {
  static void refused(Args...) {
    rope::refuse(kName, "tensors that have their values in memory",
                 "one that negates its elements: call resolve_neg first");
  }
};

constexpr char kApply[] = "apply_rotary_", kApplyQk[] = "apply_rotary_qk_";
constexpr char kOut[] = "apply_rotary.out", kQkOut[] = "apply_rotary_qk.out";
constexpr char kAt[] = "apply_rotary_qk_at_";
constexpr char kAppend[] = "apply_rotary_qk_append_kv_", kLatent[] = "apply_rotary_mla_append_";

void refuse_negative(StableLibrary& m) {
  m.impl(kApply, TORCH_BOX((&WithNegative<kApply, &rope::apply_rotary_>::refused)));
  m.impl(kApplyQk, TORCH_BOX((&WithNegative<kApplyQk, &rope::apply_rotary_qk_>::refused)));
  m.impl(kOut, TORCH_BOX((&WithNegative<kOut, &rope::apply_rotary_out>::refused)));
  m.impl(kQkOut, TORCH_BOX((&WithNegative<kQkOut, &rope::apply_rotary_qk_out>::refused)));
  m.impl(kAt, TORCH_BOX((&WithNegative<kAt, &rope::apply_rotary_qk_at_>::refused)));
  m.impl(kAppend, TORCH_BOX((&WithNegative<kAppend, &rope::apply_rotary_qk_append_kv_>::refused)));
  m.impl(kLatent, TORCH_BOX((&WithNegative<kLatent, &rope::apply_rotary_mla_append_>::refused)));
}

[[maybe_unused]] const bool registered = [] {
  try {
    rope::register_operators();
    static const StableTorchLibraryInit negative(StableLibrary::Kind::IMPL, &refuse_negative,
                                                 "rope", "Negative", __FILE__, __LINE__);
    return true;
  } catch (const std::exception& error) {
    // Nobody could catch it here. Where a copy of this library has registered them, all is well.
    std::fprintf(stderr, "librope: the operators rope::* of this copy are not registered: %s\n",
                 error.what());
    return false;
  }
}();

}  // namespace
