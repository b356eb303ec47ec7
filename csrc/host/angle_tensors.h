// The tensors that angles are made of, with contiguous memory, which the kernels need.
#pragma once

#include <optional>

#include "args.h"
#include "call.h"
#include "check/angles.h"

namespace rope {

// x itself, or a copy in `copy`, which is small beside the tables or rotations that are made of it.
inline const void* contiguous_data(const TensorView& x, Tensor& copy) {
  if (x.is_contiguous()) return x.const_data_ptr();
  copy = x.call().contiguous(x);
  return copy.const_data_ptr();
}

// The pointers that it sets are valid for as long as it lives.
class AngleTensors {
 public:
  // Sets inv_freq and axes of checked angles.
  void set(Angles& angles, const AngleInputs& in) {
    angles.inv_freq = contiguous_data(in.inv_freq, inv_freq_);
    if (in.axes) angles.axes.data = contiguous_data(*in.axes, axes_);
  }

  // Sets the positions as well: of all tokens as one sequence.
  void set(Angles& angles, const AngleInputs& in, int64_t tokens) {
    set(angles, in);
    angles.positions.stride_s = 1;
    angles.positions.stride_axis = tokens;
    if (in.position_ids) {
      angles.positions.data = contiguous_data(*in.position_ids, position_ids_);
    }
  }

 private:
  Tensor inv_freq_, axes_, position_ids_;  // the copies
};

}  // namespace rope
