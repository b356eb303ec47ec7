// Checks of q and k, the tensors that rotate, and of which of their channels do.
#pragma once

#include <optional>
#include <string>

#include "check/parts.h"

namespace rope {

// x: [B, S, H, D] or [T, H, D], of a supported dtype, last stride 1.
inline DType check_rotated(const char* op, const char* name, const TensorView& x) {
  if (x.dim() != 3 && x.dim() != 4) {
    refuse(op, text(name, " to have shape [B, S, H, D] or [T, H, D]"), shape_text(x));
  }
  const DType dtype = check_floating(op, name, x);
  check_last_stride(op, name, x);
  return dtype;
}

// k beside q: the same but for the number of heads.
inline void check_k(const char* op, const TensorView& q, const TensorView& k) {
  check_rotated(op, "k", k);
  bool same = k.dim() == q.dim();
  for (int64_t d = 0; same && d < q.dim(); ++d) {
    same = d == q.dim() - 2 || k.size(d) == q.size(d);
  }
  if (!same) {
    auto expected = shape_text(q);
    refuse(op, text("k to have q's shape ", expected, " in all but the number of heads"),
           shape_text(k));
  }
  check_dtype_like(op, "k", k, "q", q);
  check_device(op, "k", k, "q", q);
}

// rotary_dim R: as given, or 2 W. W is the width of a table or the length of inv_freq, and `of`
// says which. A table, but no inv_freq, may hold one angle a channel, W == R.
inline int64_t check_rotary_dim(const char* op, std::optional<int64_t> given, int64_t width,
                                const char* of, int64_t head_dim, bool is_table) {
  const int64_t rotary_dim = given.value_or(2 * width);
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > head_dim) {
    const bool by_channel = is_table && !given && width >= 2 && width % 2 == 0 && width <= head_dim;
    refuse(op,
           text(given ? std::string("rotary_dim") : text("rotary_dim, twice ", of, ","),
                " to be even, at least 2 and at most head_dim ", head_dim),
           text(rotary_dim),
           by_channel ? text("a table with one angle a channel, such as cat((freqs, freqs), -1), "
                             "needs rotary_dim=",
                             width)
                      : "");
  }
  return rotary_dim;
}

// The first channel that rotates.
inline int64_t check_rotary_offset(const char* op, int64_t given, int64_t rotary_dim,
                                   int64_t head_dim) {
  const int64_t most = head_dim - rotary_dim;
  if (given < 0 || given > most) {
    refuse(op,
           text("rotary_offset to be at least 0 and at most head_dim - rotary_dim, ", head_dim,
                " - ", rotary_dim),
           text(given));
  }
  return given;
}

inline Heads<const void*> heads_of(const TensorView& x, DType dtype, int64_t rotary_offset) {
  return heads_of(x.strides(), x.const_data_ptr(), dtype, rotary_offset);
}

inline RotatedHeads rotated_heads(const TensorView& x, DType dtype, int64_t rotary_offset) {
  return {heads_of(x, dtype, rotary_offset), {}, x.size(x.dim() - 2)};
}

}  // namespace rope
