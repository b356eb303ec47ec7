// Do two strided tensors share memory? Needed before writing in place: q and k are often views of
// one packed tensor, and their address ranges overlap although they have no byte in common.
#pragma once

#include <cstdint>

#include "args.h"

namespace rope {

// The bytes of a tensor: `bytes` contiguous ones at each base + sum of index[d] * stride[d].
struct Footprint {
  static constexpr int kMaxDims = 4;
  const char* base;
  int64_t bytes;
  int dims = 0;
  int64_t size[kMaxDims], stride[kMaxDims];  // sizes of at least 2, by rising stride (bytes)

  Footprint(const void* data, int64_t contiguous_bytes)
      : base(static_cast<const char*>(data)), bytes(contiguous_bytes) {}
  void add_dim(int64_t dim_size, int64_t dim_stride_bytes);
  int64_t extent() const;  // from the first byte to past the last
};

// True if an element may be reached by two indices: an expanded or sliding view.
bool overlaps_itself(const Footprint& a);

// True if a byte belongs to both; also if the search gives up, as for views with many interleaved
// dimensions.
bool overlap(const Footprint& a, const Footprint& b);

}  // namespace rope
