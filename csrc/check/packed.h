// Packed q, k and v: [.., Hq + 2 Hk, D], the heads of q, then of k, then of v; or by group,
// [.., Hk, Hq / Hk + 2, D].
#pragma once

#include <optional>

#include "args.h"
#include "check/parts.h"
#include "tensor.h"

namespace rope {

struct Packing {
  bool by_group;
  int64_t token_dims;                 // 2: batch and sequence; 1
  int64_t groups, q_heads, kv_heads;  // heads: of each group

  int64_t all_heads() const { return q_heads + 2 * kv_heads; }
};

// kv_heads: Hk; none: by group.
Packing check_packing(const char* op, const TensorView& qkv, std::optional<int64_t> kv_heads);

// From the numbers of heads.
Packing check_packing(const char* op, int64_t q_heads, int64_t kv_heads, bool by_group,
                      int64_t token_dims);

// Heads [first, first + count) of the first group, as a tensor [B, S, count, D] or [T, count, D]
// for the checks of q and k. Its arrays are its own: it stays where it is.
class HeadsOfGroup : public TensorView {
 public:
  HeadsOfGroup(const TensorView& qkv, const Packing& packing, int64_t first, int64_t count);
  HeadsOfGroup(const HeadsOfGroup&) = delete;

 private:
  int64_t sizes_[4], strides_[4];
};

// The heads from `first` on, in each group of a packed tensor with its elements at `data`.
template <class Pointer>
Heads<Pointer> packed_heads(const TensorView& qkv, Pointer data, const Packing& packing,
                            int64_t first, const RotaryArgs& args) {
  const int64_t last = qkv.dim() - 1, stride_h = qkv.stride(last - 1);
  const bool batched = packing.token_dims == 2;
  const int64_t channel = args.rotary_offset + first * stride_h;
  using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char, const char>;
  if (data != nullptr) data = static_cast<Byte*>(data) + channel * size_of(args.dtype);
  return {data, batched ? qkv.stride(0) : 0, qkv.stride(packing.token_dims - 1), stride_h,
          packing.by_group ? qkv.stride(last - 2) : 0};
}

// q, k or v as a tensor of its own, with `heads` heads of each group.
template <class Pointer>
Heads<Pointer> heads_by_group(const TensorView& x, Pointer data, int64_t heads,
                              const RotaryArgs& args) {
  Heads<Pointer> out = heads_of(x.strides(), data, args.dtype, args.rotary_offset);
  out.stride_g = heads * out.stride_h;
  return out;
}

// q, k or v, or a gradient of one: [B, S, heads, D] or [T, heads, D], beside x, whose tokens and
// channels it has.
void check_part(const char* op, const char* name, const TensorView& part, int64_t heads,
                int64_t token_dims, const char* x_name, const TensorView& x);

}  // namespace rope
