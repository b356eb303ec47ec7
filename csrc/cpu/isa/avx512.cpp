// The CPU kernels for AVX-512 (F, BW, DQ and VL), in vectors of 64 bytes.
#include "cpu/isa/isa.h"

#if ROPE_X86
#include <immintrin.h>

namespace rope::cpu {
namespace {

// From Ice Lake and Zen 4 on, which VBMI2 came with: the processors before them lower their clock
// for vectors of 64 bytes, and are left to AVX2.
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2");
}

}  // namespace
}  // namespace rope::cpu

ROPE_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#include "math/angle.h"
#include "math/float8.h"
#include "math/rotation.h"

namespace rope::cpu {
namespace {

constexpr int kVectorBytes = 64, kNativeBytes = 64;

// clang-format off
#include "cpu/isa/vectors.inl"
#include "cpu/isa/bfloat16.inl"
// clang-format on

// With a mask of all lanes: of the forms without, GCC 12 warns that they are not initialised.
constexpr __mmask16 kAllLanes = 0xffff;

ROPE_HOST_DEVICE F32 float_of_half(const U16& h) {
  return bit_cast<F32>(_mm512_maskz_cvtph_ps(kAllLanes, bit_cast<__m256i>(h)));
}
ROPE_HOST_DEVICE U16 half_of_float(const F32& v) {
  return bit_cast<U16>(_mm512_maskz_cvtps_ph(kAllLanes, bit_cast<__m512>(v),
                                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// See bfloat16.inl. The halves of a word that stay and go change places by one shuffle of bytes
// each, and a half that goes gives a carry if it, 0x7fff and the lowest bit of the half that stays
// add up to 2^16, which is the highest bit of an average rounded up.
ROPE_HOST_DEVICE U32 pack(const F32& low, const F32& high) {
  const __m512i a = bit_cast<__m512i>(low), b = bit_cast<__m512i>(high);
  const __m512i upper = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  const __m512i lower = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
  const __m512i stays = _mm512_mask_shuffle_epi8(b, 0x3333333333333333, a, upper);
  const __m512i goes = _mm512_mask_shuffle_epi8(a, 0xcccccccccccccccc, b, lower);
  const __m512i odd = _mm512_and_si512(stays, _mm512_set1_epi16(1));
  const __m512i average = _mm512_avg_epu16(goes, _mm512_or_si512(odd, _mm512_set1_epi16(0x7ffe)));
  return bit_cast<U32>(_mm512_add_epi16(stays, _mm512_srli_epi16(average, 15)));
}

// The mask of the first bytes of a vector: all for 64 or more, none for 0 or less.
ROPE_HOST_DEVICE __mmask64 first_bytes(int64_t bytes) {
  return bytes <= 0 ? 0 : ~uint64_t{0} >> (bytes < 64 ? 64 - bytes : 0);
}

// As few.inl has them.
template <int64_t kBelow, class T>
ROPE_HOST_DEVICE void copy_few(T* to, const T* buffer, int64_t count) {
  constexpr int64_t kSize = sizeof(T), kPart = 64 / kSize;
  if constexpr (kBelow < kPart) {
    static_assert(2 * kBelow == kPart, "half a vector, or whole ones");
    const __mmask32 mask = static_cast<__mmask32>(first_bytes(count * kSize));
    _mm256_mask_storeu_epi8(to, mask, read<__m256i>(buffer));
  } else {
    for (int64_t i = 0; i < kBelow; i += kPart) {
      const __mmask64 mask = first_bytes((count - i) * kSize);
      _mm512_mask_storeu_epi8(to + i, mask, read<__m512i>(buffer + i));
    }
  }
}
template <int64_t kBelow, class T>
ROPE_HOST_DEVICE void fill_few(T* buffer, const T* from, int64_t count) {
  constexpr int64_t kSize = sizeof(T), kPart = 64 / kSize;
  for (int64_t i = 0; i < kBelow; i += kPart) {
    const __m512i part = _mm512_maskz_loadu_epi8(first_bytes((count - i) * kSize), from + i);
    memcpy(buffer + i, &part, std::min(kBelow, kPart) * kSize);
  }
}

// U16 is half as wide as the other vectors.
template <class V>
ROPE_HOST_DEVICE void stream(void* to, const V& v) {
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
  } else {
    _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
  }
}
ROPE_HOST_DEVICE void finish_streaming() { _mm_sfence(); }

#include "cpu/isa/kernels.inl"

}  // namespace

constexpr Isa kAvx512{"avx512", supported, kVectorBytes, kKernels};

}  // namespace rope::cpu
ROPE_END_TARGET

#else
namespace rope::cpu {
constexpr Isa kAvx512{"avx512", [] { return false; }, 0, {}};
}  // namespace rope::cpu
#endif
