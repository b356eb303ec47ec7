// The CPU kernels for any processor: SSE2, NEON or whatever the compiler's baseline offers.
#include "cpu/isa/isa.h"

#if ROPE_ARM64
#include <arm_neon.h>
#endif

#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"

namespace rope::cpu {
namespace {

constexpr int kVectorBytes = ROPE_ARM64 ? 16 : 32, kNativeBytes = 16;

// clang-format off
#include "cpu/isa/few.inl"
#include "cpu/isa/vectors.inl"
#include "cpu/isa/bfloat16.inl"
#if ROPE_ARM64
#include "cpu/isa/float16_arm64.inl"
#else
#include "cpu/isa/float16.inl"
#endif
// clang-format on

// Not every processor has stores past the caches: these are ordinary ones.
template <class V>
ROPE_HOST_DEVICE void stream(void* to, const V& v) {
  memcpy(to, &v, sizeof(v));
}
ROPE_HOST_DEVICE void finish_streaming() {}

#include "cpu/isa/kernels.inl"

}  // namespace

constexpr Isa kPortable{"portable", [] { return true; }, kVectorBytes, kKernels};

}  // namespace rope::cpu
