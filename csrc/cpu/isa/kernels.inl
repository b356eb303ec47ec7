// The kernels of one instruction set. Included once by its file, which selects the instructions,
// inside namespace rope::cpu and an anonymous one, after vectors.inl and what that asks for. Each
// fragment uses those before it.

// clang-format off
#include "cpu/isa/storage.inl"
#include "cpu/isa/pairs.inl"
#include "cpu/isa/token_angles.inl"
#include "cpu/isa/table_rows.inl"

#include "cpu/isa/rotation.inl"
#include "cpu/isa/table_grad.inl"
#include "cpu/isa/angles.inl"
#include "cpu/isa/kv_cache.inl"
#include "cpu/isa/cached_keys.inl"
#include "cpu/isa/norm_heads.inl"
#include "cpu/isa/rms_norm.inl"
#include "cpu/isa/rms_norm_append.inl"
#include "cpu/isa/rms_norm_grad.inl"
// clang-format on

constexpr Kernels kKernels{
    apply_rotary,    apply_rotary_at,        rotary_table_grad,    cos_sin,
    cos_sin_grad,    cos_sin_grad_sum,       apply_rotary_append,  shift_cached_k,
    rms_norm_rotary, rms_norm_rotary_append, rms_norm_rotary_grad, rms_norm_rotary_grad_sum};
