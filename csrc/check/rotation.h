// From the arguments of a rotation by rows of cos and sin to its plain struct: for the rotation
// itself, its gradient to the table, the KV caches and RMSNorm.
#pragma once

#include <optional>
#include <utility>

#include "args.h"
#include "call.h"
#include "check/parts.h"
#include "packs.h"
#include "tensor.h"

namespace rope {

struct RotaryInputs {
  RotaryInputs(const char* op, const TensorView& q, const TensorView* k, const Rows& rows,
               const Rotation& rotation)
      : op(op),
        q(q),
        cos(rows.cos),
        sin(rows.sin),
        position_ids(view(rows.position_ids)),
        rotation(rotation) {
    if (k != nullptr) this->k.emplace(*k);
    q_name = k != nullptr ? "q" : "x";
  }

  const char* op;
  const char* q_name;                      // x for the operators on one tensor
  TensorView q;                            // [B, S, H, D] or [T, H, D]
  std::optional<TensorView> k;             // [B, S, Hk, D] or [T, Hk, D]
  TensorView cos, sin;                     // [L, W], [1|B, S, W] or [1, T, W]
  std::optional<TensorView> position_ids;  // [S], [1|B, S] or [T]
  Rotation rotation;
};

// Everything but the outputs.
RotaryArgs check_apply_rotary(const RotaryInputs& in);

struct CheckedTable {
  Table table;
  int64_t rotary_dim, rotary_offset;
};

// cos and sin, for the rotation of x.
CheckedTable check_table(const char* op, const TensorView& cos, const TensorView& sin,
                         const TensorView& x, const char* x_name, bool has_positions,
                         const Rotation& rotation);

// In the struct of a kernel.
inline void set_flags(RotationFlags& flags, const Rotation& rotation) {
  flags.interleaved = rotation.interleaved;
  flags.interleaved_out = rotation.result_interleaved();
  flags.inverse = rotation.inverse;
}

// Makes it the transposed rotation, for gradients: this reads the pairs in the order of the result.
// The columns of the table keep their order.
inline void transpose(RotaryArgs& rotary) {
  std::swap(rotary.interleaved, rotary.interleaved_out);
  rotary.inverse = !rotary.inverse;
}

// Before a rotation in place: the pairs of x keep their order.
void check_order_stays(const char* op, const Rotation& rotation);

}  // namespace rope
