// The CPU kernels compiled for one instruction set: what runs inside a thread.
//
// Each function works on a range [begin, end) of its operator's items; apply_rotary_cpu.cpp and its
// neighbours say what an item is and split the items over threads. isa_portable.cpp is always
// compiled, isa_avx2.cpp on x86-64; both from the same bodies.
#pragma once

#include "args.h"
#include "cpu/capability.h"
#include "host/compiler.h"
#include "math/index.h"

namespace rope::cpu {

// How apply_rotary and apply_rotary_at are cut. Items: (block of consecutive tokens of one batch
// row, head of q or k), the blocks outermost. A block's rows of the table are read and converted
// once for all its heads.
struct RotaryPlan {
  int64_t block_tokens;  // at most kMaxBlockTokens
  int64_t blocks_a_batch_row;
  bool stream;  // write past the caches
};

constexpr int64_t kMaxBlockTokens = 16;
constexpr int64_t kStreamAlignment = 32;  // bytes, of every vector that is streamed

struct Isa {
  void (*apply_rotary)(const RotaryArgs&, const RotaryPlan&, int64_t begin, int64_t end);
  void (*apply_rotary_at)(const RotaryAtArgs&, const RotaryPlan&, int64_t begin, int64_t end);
  void (*rotary_table_grad)(const RotaryTableGradArgs&, int64_t begin, int64_t end);  // rows
  void (*cos_sin)(const CosSinArgs&, int64_t begin, int64_t end);                     // tokens
  void (*cos_sin_grad)(const CosSinGradArgs&, int64_t begin, int64_t end);            // chunks
  void (*cos_sin_grad_sum)(const CosSinGradArgs&);
  void (*apply_rotary_append)(const AppendArgs&, int64_t begin, int64_t end);              // tokens
  void (*rms_norm_rotary)(const RmsNormRotaryArgs&, int64_t begin, int64_t end);           // tokens
  void (*rms_norm_rotary_grad)(const RmsNormRotaryGradArgs&, int64_t begin, int64_t end);  // chunks
  void (*rms_norm_rotary_grad_sum)(const RmsNormRotaryGradArgs&, int64_t begin,
                                   int64_t end);  // columns
};

extern const Isa kPortable;
#if ROPE_X86
extern const Isa kAvx2;
#endif

// The one in use.
inline const Isa& isa() {
#if ROPE_X86
  if (capability() == Capability::Avx2) return kAvx2;
#endif
  return kPortable;
}

}  // namespace rope::cpu
