// The kernels, and a table of them for each device. Each takes one plain struct of args.h and
// trusts it; the type of the struct tells which kernel a call needs.
#pragma once

#include <tuple>

#include "args.h"

namespace rope {

namespace cpu {
void apply_rotary(const RotaryArgs& args);
void apply_rotary_at(const RotaryAtArgs& args);
void apply_rotary_qkv(const RotaryQkvArgs& args);
void rotary_table_grad(const RotaryTableGradArgs& args);
void cos_sin(const CosSinArgs& args);
void cos_sin_grad(const CosSinGradArgs& args);
void apply_rotary_append(const AppendArgs& args);
void rms_norm_rotary(const RmsNormRotaryArgs& args);
void rms_norm_rotary_append(const RmsNormAppendArgs& args);
void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args);
void shift_cached_k(const ShiftArgs& args);
void apply_rotary_quantize(const QuantizeArgs& args);

constexpr std::tuple kKernels{&apply_rotary,         &apply_rotary_at, &apply_rotary_qkv,
                              &rotary_table_grad,    &cos_sin,         &cos_sin_grad,
                              &apply_rotary_append,  &rms_norm_rotary, &rms_norm_rotary_append,
                              &rms_norm_rotary_grad, &shift_cached_k,  &apply_rotary_quantize};
}  // namespace cpu

// Launched on `stream` (a cudaStream_t) of the current device, without synchronising.
namespace cuda {
void apply_rotary(const RotaryArgs& args, void* stream);
void apply_rotary_at(const RotaryAtArgs& args, void* stream);
void apply_rotary_qkv(const RotaryQkvArgs& args, void* stream);
void rotary_table_grad(const RotaryTableGradArgs& args, void* stream);
void cos_sin(const CosSinArgs& args, void* stream);
void cos_sin_grad(const CosSinGradArgs& args, void* stream);
void apply_rotary_append(const AppendArgs& args, void* stream);
void rms_norm_rotary(const RmsNormRotaryArgs& args, void* stream);
void rms_norm_rotary_append(const RmsNormAppendArgs& args, void* stream);
void rms_norm_rotary_grad(const RmsNormRotaryGradArgs& args, void* stream);
void shift_cached_k(const ShiftArgs& args, void* stream);
void apply_rotary_quantize(const QuantizeArgs& args, void* stream);

#if defined(ROPE_EXT_CUDA)
constexpr std::tuple kKernels{&apply_rotary,         &apply_rotary_at, &apply_rotary_qkv,
                              &rotary_table_grad,    &cos_sin,         &cos_sin_grad,
                              &apply_rotary_append,  &rms_norm_rotary, &rms_norm_rotary_append,
                              &rms_norm_rotary_grad, &shift_cached_k,  &apply_rotary_quantize};
#else
constexpr std::tuple<> kKernels;  // a build without CUDA
#endif
}  // namespace cuda

constexpr bool kBuiltWithCuda = std::tuple_size_v<decltype(cuda::kKernels)> > 0;

}  // namespace rope
