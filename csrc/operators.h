// The operators as C++ functions, one a schema of ops.cpp and with its arguments, for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace rope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;
using OptionalBool = std::optional<bool>;

// ops.cpp. Makes them torch.ops.rope.*, and returns true; false where this has been done. Throws
// where another library has taken the namespace or a name in it: then nothing is registered.
bool register_operators();

// apply_rotary.cpp
Tensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const OptionalTensor& position_ids, OptionalInt rotary_dim,
                    int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                    bool inverse);
std::tuple<Tensor, Tensor> apply_rotary_qk(const Tensor& q, const Tensor& k, const Tensor& cos,
                                           const Tensor& sin, const OptionalTensor& position_ids,
                                           OptionalInt rotary_dim, int64_t rotary_offset,
                                           bool interleaved, OptionalBool interleaved_out,
                                           bool inverse);
void apply_rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
                   const OptionalTensor& position_ids, OptionalInt rotary_dim,
                   int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                   bool inverse);
void apply_rotary_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim,
                      int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                      bool inverse);
void apply_rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& position_ids, OptionalInt rotary_dim,
                      int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                      bool inverse, const Tensor& out);
void apply_rotary_qk_out(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                         const OptionalTensor& position_ids, OptionalInt rotary_dim,
                         int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
                         bool inverse, const Tensor& out_q, const Tensor& out_k);
std::tuple<Tensor, Tensor> apply_rotary_table_backward(
    const Tensor& grad_q, const Tensor& q, const OptionalTensor& grad_k, const OptionalTensor& k,
    const Tensor& cos, const OptionalTensor& token_order, const OptionalTensor& row_offsets,
    OptionalInt rotary_dim, int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out,
    bool inverse);

// apply_rotary_append.cpp
void apply_rotary_qk_append_kv_(const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& k_cache, const Tensor& v_cache,
                                const Tensor& slot_mapping, const Tensor& cos, const Tensor& sin,
                                const OptionalTensor& position_ids, const OptionalTensor& k_scale,
                                const OptionalTensor& v_scale, OptionalInt rotary_dim,
                                int64_t rotary_offset, bool interleaved, bool inverse);
void apply_rotary_mla_append_(const Tensor& q, const Tensor& k_pe, const Tensor& kv_c,
                              const Tensor& kv_cache, const Tensor& slot_mapping, const Tensor& cos,
                              const Tensor& sin, const OptionalTensor& position_ids,
                              const OptionalTensor& scale, bool interleaved,
                              OptionalBool interleaved_out);

// cos_sin.cpp
std::tuple<Tensor, Tensor> cos_sin_cache(const Tensor& inv_freq, int64_t length, int64_t start,
                                         double attention_scaling, std::optional<ScalarType> dtype);
std::tuple<Tensor, Tensor> cos_sin(const Tensor& inv_freq, const Tensor& position_ids,
                                   const OptionalTensor& axes, double attention_scaling,
                                   std::optional<ScalarType> dtype);
Tensor cos_sin_backward(const Tensor& grad_cos, const Tensor& grad_sin, const Tensor& inv_freq,
                        const OptionalTensor& position_ids, const OptionalTensor& axes,
                        int64_t start, double attention_scaling);

// apply_rotary_at.cpp
std::tuple<Tensor, Tensor> apply_rotary_qk_at(const Tensor& q, const Tensor& k,
                                              const Tensor& inv_freq,
                                              const OptionalTensor& position_ids,
                                              const OptionalTensor& axes, double attention_scaling,
                                              int64_t rotary_offset, bool interleaved,
                                              OptionalBool interleaved_out, bool inverse);
void apply_rotary_qk_at_(const Tensor& q, const Tensor& k, const Tensor& inv_freq,
                         const OptionalTensor& position_ids, const OptionalTensor& axes,
                         double attention_scaling, int64_t rotary_offset, bool interleaved,
                         OptionalBool interleaved_out, bool inverse);

// rms_norm_rotary.cpp
std::tuple<Tensor, Tensor> rms_norm_rotary_qk(const Tensor& q, const Tensor& k,
                                              const Tensor& q_weight, const Tensor& k_weight,
                                              const Tensor& cos, const Tensor& sin,
                                              const OptionalTensor& position_ids, double eps,
                                              bool unit_offset, OptionalInt rotary_dim,
                                              int64_t rotary_offset, bool interleaved,
                                              OptionalBool interleaved_out, bool inverse);
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_rotary_qk_backward(
    const OptionalTensor& grad_q, const OptionalTensor& grad_k, const Tensor& q, const Tensor& k,
    const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
    const OptionalTensor& position_ids, double eps, bool unit_offset, OptionalInt rotary_dim,
    int64_t rotary_offset, bool interleaved, OptionalBool interleaved_out, bool inverse);

}  // namespace rope
