// bfloat16 converted without instructions for it. Included by the file of an instruction set that
// has none.

// The bits of a bfloat16 are the upper half of those of a float32.
ROPE_HOST_DEVICE F32 float_of_bfloat16(const U16& h) {
  return bit_cast<F32>(__builtin_convertvector(h, U32) << 16);
}

// Rounded into the upper half of each lane; the lower half is undefined. A NaN stays NaN if its
// lower half is zero.
ROPE_HOST_DEVICE U32 nearest_bfloat16(const F32& v) {
  const U32 u = bit_cast<U32>(v);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

// Every NaN stays NaN.
ROPE_HOST_DEVICE U16 bfloat16_of_float(const F32& v) {
  const U32 rounded = where_nan(v, U32{} + 0x7fc00000u, nearest_bfloat16(v));
  return __builtin_convertvector(rounded >> 16, U16);
}

constexpr int alternate_lane(int i, int n, int) { return i % 2 == 0 ? i : n + i; }

// The lower half of each word from `low`, the upper half from `high`.
ROPE_HOST_DEVICE Vec<uint16_t> blend_halves(const U32& low, const U32& high) {
  using Words = Vec<uint16_t>;
  return shuffle<alternate_lane, kFloats>(bit_cast<Words>(low), bit_cast<Words>(high));
}

constexpr bool kBFloat16InWords = true;

// The NaNs of a rotation have a lower half of zero where x is bfloat16 and the table has no other
// NaN. An instruction set that has a shorter way overloads it for F32.
template <class F>
ROPE_HOST_DEVICE U32 pack(const F& low, const F& high) {
  if constexpr (ROPE_X86 && kIsNative<U32>) {
    // Both floats at once, in lanes of 16 bits: the half that stays is one more where the half that
    // goes is more than half a unit, or is half a unit and the one that stays is odd.
    const U32 a = bit_cast<U32>(low), b = bit_cast<U32>(high);
    const Vec<uint16_t> stays = blend_halves(a >> 16, b);
    const Vec<uint16_t> goes = blend_halves(a, b << 16);
    using Signed = Vec<int16_t>;
    const Signed above_half = bit_cast<Signed>(goes ^ uint16_t{0x8000});  // if > 0
    const Signed odd = bit_cast<Signed>(stays & uint16_t{1});
    return bit_cast<U32>(stays - bit_cast<Vec<uint16_t>>(above_half > -odd));
  } else {
    // In lanes of 32 bits, where there is no blend of 16-bit lanes.
    return (nearest_bfloat16(low) >> 16) | (nearest_bfloat16(high) & 0xffff0000u);
  }
}
