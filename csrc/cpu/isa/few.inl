// Fewer elements than a vector has, moved without masks, by moves of fixed sizes, which take a
// fraction of the time of a memcpy whose size is unknown. Included by the file of an instruction
// set that has no masks.

// Copies the first count < kBelow elements (kBelow a power of two) of a buffer of kBelow elements.
template <int64_t kBelow, class T>
ROPE_HOST_DEVICE void copy_few(T* to, const T* buffer, int64_t count) {
  if constexpr (kBelow > 1) {
    constexpr int64_t kHalf = kBelow / 2;
    if (count & kHalf) {
      memcpy(to, buffer, kHalf * sizeof(T));
      to += kHalf;
      buffer += kHalf;
    }
    copy_few<kHalf>(to, buffer, count);
  }
}

// Fills such a buffer with count elements, and zeros after them.
template <int64_t kBelow, class T>
ROPE_HOST_DEVICE void fill_few(T* buffer, const T* from, int64_t count) {
  for (int64_t i = 0; i < kBelow; ++i) buffer[i] = {};
  copy_few<kBelow>(buffer, from, count);
}
