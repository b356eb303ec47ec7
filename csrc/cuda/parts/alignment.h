// The widest vectors that addresses, strides and lengths allow. Plain arithmetic on the host.
#pragma once

#include <cstdint>

#include "args.h"

namespace rope::cuda {

class Alignment {
 public:
  explicit Alignment(int64_t element_bytes) : element_bytes_(element_bytes) {}

  void add_address(const void* data) { bits_ |= reinterpret_cast<uintptr_t>(data); }

  // A stride or a length, in elements.
  void add_elements(int64_t count) { bits_ |= static_cast<uint64_t>(count * element_bytes_); }

  // The stride of a dimension of size 1 is never used.
  template <class Pointer>
  void add(const Heads<Pointer>& x, int64_t batch, int64_t seq, int64_t heads) {
    add_address(x.data);
    add_elements(x.stride_g);
    if (batch > 1) add_elements(x.stride_b);
    if (seq > 1) add_elements(x.stride_s);
    if (heads > 1) add_elements(x.stride_h);
  }

  // The channels of a head: those that rotate, in two halves unless all pairs are interleaved, and
  // those beside them if they are moved too.
  void add_channels(const RotaryArgs& args, bool moves_others) {
    add_elements(args.interleaved && args.interleaved_out ? args.rotary_dim : args.rotary_dim / 2);
    if (!moves_others) return;
    add_elements(args.rotary_offset);
    add_elements(args.head_dim - args.rotary_dim);
  }

  bool allows(int64_t bytes) const { return bits_ % bytes == 0; }

 private:
  int64_t element_bytes_;
  uint64_t bits_ = 0;
};

// Whether `columns` consecutive columns of the table, from a multiple of as many on, can be read in
// vectors. Columns of float64 for narrower channels are read one by one.
inline bool table_allows(const Table& table, DType of_channels, int64_t columns) {
  const int64_t bytes = size_of(table.dtype);
  if (table.dtype == DType::Float64 && of_channels != DType::Float64) return true;
  Alignment alignment(bytes);
  alignment.add_address(table.cos);
  alignment.add_address(table.sin);
  alignment.add_elements(table.cos_stride_row | table.sin_stride_row);
  alignment.add_elements(table.cos_stride_b | table.sin_stride_b);
  return alignment.allows(columns * bytes < 16 ? columns * bytes : 16);
}

}  // namespace rope::cuda
