// float16 (IEEE 754 binary16: 1 sign, 5 exponent bits with bias 15, 10 mantissa bits) converted
// without instructions for it. Included by the file of an instruction set that has none.

ROPE_HOST_DEVICE F32 float_of_half(const U16& h) {
  const U32 bits = __builtin_convertvector(h, U32);
  const U32 magnitude = (bits & 0x7fffu) << 13;
  const U32 sign = (bits & 0x8000u) << 16;
  const U32 normal = magnitude + (112u << 23);
  // A subnormal m * 2^-24 is (1 + m * 2^-10) * 2^-14 - 2^-14, exactly.
  const F32 tiny = bit_cast<F32>(magnitude + (113u << 23)) - 0x1p-14f;
  const U32 special = magnitude | (255u << 23);
  const I32 order = bit_cast<I32>(magnitude);
  U32 result = where_less(order, I32{} + (1 << 23), bit_cast<U32>(tiny), normal);
  result = where_less(order, I32{} + (31 << 23), result, special);
  return bit_cast<F32>(result | sign);
}

ROPE_HOST_DEVICE U16 half_of_float(const F32& v) {
  const U32 bits = bit_cast<U32>(v);
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is the unit of float32 at 0.5: the addition rounds.
  const F32 shifted = bit_cast<F32>(magnitude) + 0.5f;
  const U32 subnormal = bit_cast<U32>(shifted) - (126u << 23);
  const I32 order = bit_cast<I32>(magnitude);
  U32 result = where_less(order, I32{} + (113 << 23), subnormal, normal);
  result = where_less(order, I32{} + (143 << 23), result, U32{} + 0x7c00u);  // from 2^16 on
  result = where_nan(v, U32{} + 0x7e00u, result);
  return __builtin_convertvector(result | sign, U16);
}
