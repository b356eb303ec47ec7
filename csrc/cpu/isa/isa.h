// The CPU kernels compiled for one instruction set: what each thread executes.
//
// A new instruction set is a file beside avx2.cpp, a declaration below, and an entry of the list in
// capability.cpp.
#pragma once

// For the kernels, and included here, before a file selects its instructions: otherwise functions
// of the standard library would be compiled for instructions that the processor may lack.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "args.h"
#include "host/compiler.h"
#include "math/index.h"

namespace rope::cpu {

// How apply_rotary and apply_rotary_at are divided: into items (block of consecutive tokens of one
// sequence, head of q or k), in this order, the heads of a block one after the other. The rows of
// the table for a block are read and converted once for all its heads.
struct RotaryBlocks {
  int64_t tokens;  // of each block, at most kMaxBlockTokens
  int64_t per_sequence;
  bool stream;  // store past the caches
};

constexpr int64_t kMaxBlockTokens = 16;

// How many heads of q scratch memory has room for, if q becomes float8: at least one.
inline int64_t heads_in_scratch(const RotaryArgs& args) {
  constexpr int64_t kChannels = 4096;
  return std::max<int64_t>(kChannels / args.head_dim, 1);
}

// Each function works on a range [begin, end) of items: tokens, but for what is said. The family's
// file in csrc/cpu divides them among threads.
struct Kernels {
  void (*apply_rotary)(const RotaryArgs&, const RotaryBlocks&, int64_t begin, int64_t end);
  void (*apply_rotary_at)(const RotaryAtArgs&, const RotaryBlocks&, int64_t begin, int64_t end);
  void (*apply_rotary_qkv)(const RotaryQkvArgs&, int64_t begin, int64_t end);
  void (*rotary_table_grad)(const RotaryTableGradArgs&, int64_t begin, int64_t end);  // rows
  void (*cos_sin)(const CosSinArgs&, int64_t begin, int64_t end);
  void (*cos_sin_grad)(const CosSinGradArgs&, int64_t begin, int64_t end);  // chunks
  void (*cos_sin_grad_sum)(const CosSinGradArgs&);
  void (*apply_rotary_append)(const AppendArgs&, int64_t begin, int64_t end, void* scratch);
  void (*shift_cached_k)(const ShiftArgs&, int64_t begin, int64_t end);
  void (*apply_rotary_quantize)(const QuantizeArgs&, int64_t begin, int64_t end,
                                void* scratch);  // heads
  void (*rms_norm_rotary)(const RmsNormRotaryArgs&, int64_t begin, int64_t end);
  void (*rms_norm_rotary_append)(const RmsNormAppendArgs&, int64_t begin, int64_t end,
                                 void* scratch);
  void (*rms_norm_rotary_grad)(const RmsNormRotaryGradArgs&, int64_t begin, int64_t end);  // chunks
  void (*rms_norm_rotary_grad_sum)(const RmsNormRotaryGradArgs&, int64_t begin,
                                   int64_t end);  // columns
};

struct Isa {
  const char* name;     // of ROPE_EXT_CPU_CAPABILITY
  bool (*supported)();  // by this processor
  int64_t vector_bytes;
  Kernels kernels;
};

extern const Isa kPortable, kAvx2, kAvx512, kArmBf16;

// The one in use. Cheap; picked at the first call, as capability() says.
const Isa& isa();

}  // namespace rope::cpu
