// What the angles of a token are computed from: positions, axes and frequencies.
#pragma once

#include "cuda/parts/vector.cuh"
#include "math/angle.h"
#include "math/index.h"

namespace rope::cuda {

__device__ __forceinline__ double value_at(const void* data, DType dtype, int64_t at) {
  double value = 0;
  dispatch(dtype, [&](auto storage) {
    Vector<decltype(storage), 1> v;
    load_constant(v, static_cast<const decltype(storage)*>(data) + at);
    unpack(v, &value);
  });
  return value;
}

// The index of a token among the positions of an axis.
__device__ __forceinline__ int64_t token_at(const TokenPositions& positions, int64_t b, int64_t s) {
  return b * positions.stride_b + s * positions.stride_s;
}

__device__ __forceinline__ double position_at(const TokenPositions& positions, int64_t at) {
  if (positions.data == nullptr) return static_cast<double>(positions.start + at);
  switch (positions.type) {
    case PositionType::Int32:
      return static_cast<double>(__ldg(static_cast<const int32_t*>(positions.data) + at));
    case PositionType::Int64:
      return static_cast<double>(__ldg(static_cast<const int64_t*>(positions.data) + at));
    case PositionType::Float64: return value_at(positions.data, DType::Float64, at);
    case PositionType::Float32: return value_at(positions.data, DType::Float32, at);
    case PositionType::Float16: return value_at(positions.data, DType::Float16, at);
    default: return value_at(positions.data, DType::BFloat16, at);
  }
}

// The position for one pair of a token. An axis that does not exist gives NaN: the kernel can't
// raise without stopping the stream.
__device__ __forceinline__ double position_of_pair(const Angles& angles, int64_t token,
                                                   int64_t pair) {
  const int64_t axis = index_at(angles.axes.data, angles.axes.int64, pair);
  if (!is_inside(axis, angles.positions.axes)) return NAN;
  return position_at(angles.positions, axis * angles.positions.stride_axis + token);
}

}  // namespace rope::cuda
