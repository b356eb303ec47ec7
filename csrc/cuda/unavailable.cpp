// What stands in for the CUDA kernels in a build without them; device.h refuses CUDA tensors first.
#if !defined(ROPE_EXT_CUDA)

#include <stdexcept>

#include "kernels.h"

namespace rope::cuda {

namespace {
[[noreturn]] void refuse() { throw std::logic_error("rope: built without CUDA"); }
}  // namespace

void apply_rotary(const RotaryArgs&, void*) { refuse(); }
void apply_rotary_at(const RotaryAtArgs&, void*) { refuse(); }
void rotary_table_grad(const RotaryTableGradArgs&, void*) { refuse(); }
void cos_sin(const CosSinArgs&, void*) { refuse(); }
void cos_sin_grad(const CosSinGradArgs&, void*) { refuse(); }
void apply_rotary_append(const AppendArgs&, void*) { refuse(); }
void rms_norm_rotary(const RmsNormRotaryArgs&, void*) { refuse(); }
void rms_norm_rotary_grad(const RmsNormRotaryGradArgs&, void*) { refuse(); }

}  // namespace rope::cuda

#endif
