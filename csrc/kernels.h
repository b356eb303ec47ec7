// The kernels, one set a device. Each takes one plain struct of args.h and trusts it.
#pragma once

#include "args.h"

namespace rope {

namespace cpu {
void apply_rotary(const RotaryArgs& args);
void apply_rotary_at(const RotaryAtArgs& args);
void rotary_table_grad(const RotaryTableGradArgs& args);
void cos_sin(const CosSinArgs& args);
void cos_sin_grad(const CosSinGradArgs& args);
void apply_rotary_append(const AppendArgs& args);
void rms_norm_rotary(const RmsNormRotaryArgs& args);
void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args);
}  // namespace cpu

// Launched on `stream` (a cudaStream_t) of the current device, without synchronising.
namespace cuda {
void apply_rotary(const RotaryArgs& args, void* stream);
void apply_rotary_at(const RotaryAtArgs& args, void* stream);
void rotary_table_grad(const RotaryTableGradArgs& args, void* stream);
void cos_sin(const CosSinArgs& args, void* stream);
void cos_sin_grad(const CosSinGradArgs& args, void* stream);
void apply_rotary_append(const AppendArgs& args, void* stream);
void rms_norm_rotary(const RmsNormRotaryArgs& args, void* stream);
void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args, void* stream);
}  // namespace cuda

}  // namespace rope
