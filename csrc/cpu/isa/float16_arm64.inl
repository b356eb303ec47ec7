// float16 by instructions that every arm64 has, for vectors of 16 bytes. Needs <arm_neon.h>.

ROPE_HOST_DEVICE F32 float_of_half(const U16& h) {
  return bit_cast<F32>(vcvt_f32_f16(bit_cast<float16x4_t>(h)));
}
ROPE_HOST_DEVICE U16 half_of_float(const F32& v) {
  return bit_cast<U16>(vcvt_f16_f32(bit_cast<float32x4_t>(v)));
}
