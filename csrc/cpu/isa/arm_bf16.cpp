// The CPU kernels for arm64 with FEAT_BF16, which rounds to bfloat16.
#include "cpu/isa/isa.h"

#if ROPE_ARM64_BF16
#include <arm_neon.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

namespace rope::cpu {
namespace {

bool supported() {
#ifdef __APPLE__
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found != 0;
#else
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, unknown to the headers of glibc 2.28
  return getauxval(AT_HWCAP2) & kBf16;
#endif
}

}  // namespace
}  // namespace rope::cpu

ROPE_BEGIN_TARGET("arch=armv8.2-a+bf16")
#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"

namespace rope::cpu {
namespace {

constexpr int kVectorBytes = 16, kNativeBytes = 16;

// clang-format off
#include "cpu/isa/few.inl"
#include "cpu/isa/vectors.inl"
#include "cpu/isa/float16_arm64.inl"
// clang-format on

ROPE_HOST_DEVICE F32 float_of_bfloat16(const U16& h) {
  return bit_cast<F32>(vshll_n_u16(bit_cast<uint16x4_t>(h), 16));
}
ROPE_HOST_DEVICE U16 bfloat16_of_float(const F32& v) {
  return bit_cast<U16>(vcvt_bf16_f32(bit_cast<float32x4_t>(v)));
}

constexpr bool kBFloat16InWords = false;

ROPE_HOST_DEVICE U32 pack(const F32& low, const F32& high) {
  const auto rounded = [](const F32& v) ROPE_ALWAYS_INLINE {
    return bit_cast<uint16x8_t>(vcvtq_low_bf16_f32(bit_cast<float32x4_t>(v)));
  };
  return bit_cast<U32>(vzip1q_u16(rounded(low), rounded(high)));
}

// Ordinary stores: arm64 has no others for single vectors.
template <class V>
ROPE_HOST_DEVICE void stream(void* to, const V& v) {
  memcpy(to, &v, sizeof(v));
}
ROPE_HOST_DEVICE void finish_streaming() {}

#include "cpu/isa/kernels.inl"

}  // namespace

constexpr Isa kArmBf16{"arm_bf16", supported, kVectorBytes, kKernels};

}  // namespace rope::cpu
ROPE_END_TARGET

#else
namespace rope::cpu {
constexpr Isa kArmBf16{"arm_bf16", [] { return false; }, 0, {}};
}  // namespace rope::cpu
#endif
