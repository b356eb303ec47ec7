// Checks of RMSNorm before a rotation: its weights and eps.
#pragma once

#include "args.h"
#include "check/rotation.h"

namespace rope {

// q_weight, k_weight: [D], or [H, D] and [Hk, D]; k_weight is null where there is one tensor, whose
// weight is called weight. rotary: from the checks of `in`.
RmsNorm check_norm(const RotaryInputs& in, const TensorView& q_weight, const TensorView* k_weight,
                   const NormOptions& options, const RotaryArgs& rotary);

}  // namespace rope
