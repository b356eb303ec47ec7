// What every check is made of. Each names the operator and the argument when it refuses.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "refusal.h"

namespace rope {

inline std::optional<DType> dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double: return DType::Float64;
    case ScalarType::Float: return DType::Float32;
    case ScalarType::Half: return DType::Float16;
    case ScalarType::BFloat16: return DType::BFloat16;
    default: return std::nullopt;
  }
}

inline bool same_sizes(const TensorView& a, const TensorView& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline DType check_floating(const char* op, const char* name, const TensorView& t) {
  const auto dtype = dtype_of(t.scalar_type());
  if (!dtype) {
    refuse(op, text(name, " to be float64, float32, float16 or bfloat16"),
           dtype_text(t.scalar_type()));
  }
  return *dtype;
}

inline void check_device(const char* op, const char* name, const TensorView& t,
                         const char* other_name, const TensorView& other) {
  if (!t.on_device_of(other)) {
    refuse(op, text(name, " on the device of ", other_name, ", ", device_text(other)),
           device_text(t));
  }
}

inline void check_last_stride(const char* op, const char* name, const TensorView& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1 && t.numel() > 0) {
    refuse(op, text(name, " to have stride 1 in its last dimension"),
           text("strides ", shape_text(t.strides())));
  }
}

inline void check_dtype_like(const char* op, const char* name, const TensorView& t,
                             const char* other_name, const TensorView& other) {
  if (t.scalar_type() != other.scalar_type()) {
    refuse(op, text(name, " of ", other_name, "'s dtype ", dtype_text(other.scalar_type())),
           dtype_text(t.scalar_type()));
  }
}

inline void check_sizes_like(const char* op, const char* name, const TensorView& t,
                             const char* other_name, const TensorView& other) {
  if (!same_sizes(t, other)) {
    refuse(op, text(name, " of ", other_name, "'s shape ", shape_text(other)), shape_text(t));
  }
}

// Calls check with t in host memory; for one that is not, only on demand, as it waits for the
// device.
template <class Check>
void on_host(const TensorView& t, const Check& check) {
  if (t.is_cpu()) return check(t);
  const char* value = std::getenv("ROPE_EXT_CHECK");
  if (value == nullptr || value[0] != '1') return;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  check(torch::stable::to(t.tensor(), cpu));
}

inline void check_int(const char* op, const char* name, const TensorView& t) {
  if (t.scalar_type() != torch::headeronly::ScalarType::Int &&
      t.scalar_type() != torch::headeronly::ScalarType::Long) {
    refuse(op, text(name, " to be int32 or int64"), dtype_text(t.scalar_type()));
  }
}

}  // namespace rope
