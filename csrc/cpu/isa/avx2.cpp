// The CPU kernels for AVX2, FMA and F16C.
#include "cpu/isa/isa.h"

#if ROPE_X86
#include <cpuid.h>
#include <immintrin.h>

namespace rope::cpu {
namespace {

bool supported() {
  // __builtin_cpu_supports("f16c") is unknown to older compilers (Clang 14, GCC 10).
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

}  // namespace
}  // namespace rope::cpu

ROPE_BEGIN_TARGET("avx2,fma,f16c")
#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"

namespace rope::cpu {
namespace {

constexpr int kVectorBytes = 32, kNativeBytes = 32;

// clang-format off
#include "cpu/isa/few.inl"
#include "cpu/isa/vectors.inl"
#include "cpu/isa/bfloat16.inl"
// clang-format on

ROPE_HOST_DEVICE F32 float_of_half(const U16& h) {
  return bit_cast<F32>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
}
ROPE_HOST_DEVICE U16 half_of_float(const F32& v) {
  return bit_cast<U16>(
      _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// U16 is half as wide as the other vectors.
template <class V>
ROPE_HOST_DEVICE void stream(void* to, const V& v) {
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
  } else {
    _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
  }
}
ROPE_HOST_DEVICE void finish_streaming() { _mm_sfence(); }

#include "cpu/isa/kernels.inl"

}  // namespace

constexpr Isa kAvx2{"avx2", supported, kVectorBytes, kKernels};

}  // namespace rope::cpu
ROPE_END_TARGET

#else
namespace rope::cpu {
constexpr Isa kAvx2{"avx2", [] { return false; }, 0, {}};
}  // namespace rope::cpu
#endif
