// What an operator writes must not overlap: neither itself, nor another tensor of the call.
#pragma once

#include <array>
#include <cstddef>
#include <optional>

#include "check/overlap.h"
#include "check/refusal.h"

namespace rope {

// An argument with its name; a null t: not given.
struct Named {
  const char* name;
  const TensorView* t;

  Named(const char* name, const TensorView* t) : name(name), t(t) {}
  Named(const char* name, const TensorView& t) : name(name), t(&t) {}
  Named(const char* name, const std::optional<TensorView>& t) : name(name), t(t ? &*t : nullptr) {}
};

// Of a tensor with dimensions, whose last stride is 1.
inline Footprint footprint_of(const TensorView& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t bytes = t.element_size();
  const size_t last = sizes.size() - 1;
  const bool dense = strides[last] == 1 || sizes[last] == 1;
  Footprint out(t.const_data_ptr(), bytes * (dense ? sizes[last] : 1));
  for (size_t d = 0; d < sizes.size() - (dense ? 1 : 0); ++d) {
    out.add_dim(sizes[d], strides[d] * bytes);
  }
  return out;
}

// Of each tensor that has elements in memory.
template <size_t kCount>
std::array<std::optional<Footprint>, kCount> footprints_of(const Named (&tensors)[kCount]) {
  std::array<std::optional<Footprint>, kCount> out;
  for (size_t i = 0; i < kCount; ++i) {
    const TensorView* const t = tensors[i].t;
    if (t != nullptr && t->numel() > 0 && t->const_data_ptr() != nullptr) out[i] = footprint_of(*t);
  }
  return out;
}

// No element of `written` may be written twice, or read while it is written.
template <size_t kWritten, size_t kRead>
void check_written(const char* op, const Named (&written)[kWritten], const Named (&read)[kRead]) {
  const auto written_at = footprints_of(written);
  const auto read_at = footprints_of(read);
  for (size_t w = 0; w < kWritten; ++w) {
    if (!written_at[w]) continue;
    if (overlaps_itself(*written_at[w])) {
      const TensorView& t = *written[w].t;
      refuse(op, text(written[w].name, " to have no two elements in one place, as it is written"),
             text("strides ", shape_text(t.strides()), " for shape ", shape_text(t)));
    }
    for (size_t r = 0; r < kRead; ++r) {
      if (read_at[r] && overlap(*written_at[w], *read_at[r])) {
        refuse(
            op,
            text(read[r].name, " to share no memory with ", written[w].name, ", which is written"),
            "overlapping tensors");
      }
    }
  }
  for (size_t a = 0; a < kWritten; ++a) {
    for (size_t b = a + 1; b < kWritten; ++b) {
      if (written_at[a] && written_at[b] && overlap(*written_at[a], *written_at[b])) {
        refuse(op,
               text(written[a].name, " and ", written[b].name,
                    " to share no memory, as both are written"),
               "overlapping tensors");
      }
    }
  }
}

}  // namespace rope
