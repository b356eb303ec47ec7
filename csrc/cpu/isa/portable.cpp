// The CPU kernels for any processor: SSE2, NEON or whatever the compiler's baseline offers.
#include "cpu/isa/isa.h"
#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"

namespace rope::cpu {
namespace {

constexpr int kVectorBytes = 32, kNativeBytes = 16;

#include "cpu/isa/few.inl"
#include "cpu/isa/vectors.inl"
// The conversions of float16, by integer arithmetic.
#include "cpu/isa/float16.inl"

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
