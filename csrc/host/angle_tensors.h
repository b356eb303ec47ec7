// The tensors that angles are made of, with contiguous memory, which the kernels need.
#pragma once

#include "args.h"
#include "host/allocation.h"
#include "packs.h"

namespace rope {

// t itself, or a copy, which is small beside the tables or rotations that are made of it.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : allocate_contiguous(t);
}

// The pointers that it sets are valid for as long as it lives.
class AngleTensors {
 public:
  AngleTensors(const Tensor& inv_freq, const OptionalTensor& axes)
      : inv_freq_(as_contiguous(inv_freq)),
        axes_(axes ? OptionalTensor(as_contiguous(*axes)) : std::nullopt) {}

  // Sets inv_freq and axes of checked angles.
  void set(Angles& angles) const {
    angles.inv_freq = inv_freq_.const_data_ptr();
    if (axes_) angles.axes.data = axes_->const_data_ptr();
  }

  // Sets the positions as well: of all tokens as one sequence.
  void set(Angles& angles, const OptionalTensor& position_ids, int64_t tokens) {
    set(angles);
    angles.positions.stride_s = 1;
    angles.positions.stride_axis = tokens;
    if (!position_ids) return;
    position_ids_ = as_contiguous(*position_ids);
    angles.positions.data = position_ids_->const_data_ptr();
  }

 private:
  Tensor inv_freq_;
  OptionalTensor axes_, position_ids_;
};

}  // namespace rope
