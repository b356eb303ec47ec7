// Checks of one tensor, or of one beside another, of which those of the families are made.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <type_traits>

#include "call.h"
#include "check/refusal.h"
#include "math/index.h"

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

// t: of the other's shape, dtype and device, last stride 1.
inline void check_like(const char* op, const char* name, const TensorView& t,
                       const char* other_name, const TensorView& other) {
  check_sizes_like(op, name, t, other_name, other);
  check_dtype_like(op, name, t, other_name, other);
  check_device(op, name, t, other_name, other);
  check_last_stride(op, name, t);
}

inline void check_int(const char* op, const char* name, const TensorView& t) {
  if (t.scalar_type() != torch::headeronly::ScalarType::Int &&
      t.scalar_type() != torch::headeronly::ScalarType::Long) {
    refuse(op, text(name, " to be int32 or int64"), dtype_text(t.scalar_type()));
  }
}

struct Sizes {
  int64_t batch, seq, head_dim;
  bool packed;
};

// Of x [B, S, H, D] or [T, H, D].
inline Sizes sizes_of(const TensorView& x) {
  if (x.dim() == 3) return {1, x.size(0), x.size(2), true};
  return {x.size(0), x.size(1), x.size(3), false};
}

// x [B, S, H, D] or [T, H, D] with these strides and its elements at `data`, from channel `first`
// of its heads on.
template <class Pointer>
Heads<Pointer> heads_of(TensorView::Sizes strides, Pointer data, DType dtype, int64_t first) {
  using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char, const char>;
  if (data != nullptr) data = static_cast<Byte*>(data) + first * size_of(dtype);
  if (strides.size() == 3) return {data, 0, strides[0], strides[1]};
  return {data, strides[0], strides[1], strides[2]};
}

// Values on CUDA are checked only on demand, as the host has to wait for the device.
inline bool checks_on_device() {
  const char* value = std::getenv("ROPE_EXT_CHECK");
  return value != nullptr && value[0] == '1';
}

// Calls look(t) with t in host memory, if its values are to be checked.
template <class Look>
void look_at_values(const TensorView& t, const Look& look) {
  if (t.is_cpu()) {
    look(t);
  } else if (checks_on_device()) {
    look(t.call().on_host(t));
  }
}

}  // namespace rope
