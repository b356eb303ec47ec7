// The tensors that angles are made of, as kernels read them: for as long as this lives.
#pragma once

#include "args.h"
#include "host/allocation.h"
#include "operators.h"

namespace rope {

// Small beside what is made of it: copied where its elements do not lie one after the other.
inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : allocate_contiguous(t); }

class AngleTensors {
 public:
  AngleTensors(const Tensor& inv_freq, const OptionalTensor& axes)
      : inv_freq_(packed(inv_freq)), axes_(axes ? OptionalTensor(packed(*axes)) : std::nullopt) {}

  // Of checked angles. The positions are given already, or none.
  void set(Angles& angles) const {
    angles.inv_freq = inv_freq_.const_data_ptr();
    if (axes_) angles.axes.data = axes_->const_data_ptr();
  }

  // Of the tokens of any positions, as one sequence.
  void set(Angles& angles, const OptionalTensor& position_ids, int64_t tokens) {
    set(angles);
    angles.positions.stride_s = 1;
    angles.positions.stride_axis = tokens;
    if (!position_ids) return;
    position_ids_ = packed(*position_ids);
    angles.positions.data = position_ids_->const_data_ptr();
  }

 private:
  Tensor inv_freq_;
  OptionalTensor axes_, position_ids_;
};

}  // namespace rope
