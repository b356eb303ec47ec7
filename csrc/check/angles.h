// From what angles are made of to their plain struct: for tables, and for rotations without one.
#pragma once

#include <optional>

#include "args.h"
#include "packs.h"
#include "tensor.h"

namespace rope {

// Without position_ids the positions are start, start + 1, ...
struct AngleInputs {
  const char* op;
  TensorView inv_freq;                     // [P]
  std::optional<TensorView> position_ids;  // of any shape; with axes [A, ...]
  std::optional<TensorView> axes;          // [P]
  int64_t start;
  double attention_scaling;
  const char* inv_freq_name = "inv_freq";  // in messages
  const char* position_ids_name = "position_ids";
};

inline AngleInputs angle_inputs(const char* op, const AngleSource& angles, int64_t start,
                                double attention_scaling) {
  return {op,    angles.inv_freq,  view(angles.position_ids), view(angles.axes),
          start, attention_scaling};
}

// Everything but the data of the tensors and the strides of the positions.
Angles check_angles(const AngleInputs& in);

}  // namespace rope
