// The tensors that results are written to: new ones, given ones, or the inputs themselves.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "call.h"
#include "check/parts.h"

namespace rope {

inline Tensor new_like(const TensorView& x, TensorView::Sizes sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return x.call().empty(x, sizes, dtype);
}

// Dense, of x's shape and order of dimensions, as torch.empty_like; last stride 1.
inline Tensor dense_like(const TensorView& x) {
  Tensor out = x.call().empty_like(x);
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && out.stride(last) != 1) return new_like(x, x.sizes());
  return out;
}

// Dense, [B, S, *of_token] or [T, *of_token], with the tokens in memory in the order of those of x.
inline Tensor new_tokens(const TensorView& x, int64_t token_dims,
                         std::initializer_list<int64_t> of_token) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().begin() + token_dims);
  const bool sequence_first =
      token_dims == 2 && x.size(0) > 1 && x.size(1) > 1 && x.stride(0) < x.stride(1);
  if (sequence_first) std::swap(sizes[0], sizes[1]);
  sizes.insert(sizes.end(), of_token);
  Tensor out = new_like(x, sizes);
  return sequence_first ? x.call().transposed(std::move(out)) : std::move(out);
}

// The result for `heads`, q or k of checked arguments, goes to `out`, a tensor of its shape.
inline void set_output(const RotaryArgs& args, RotatedHeads& heads, const TensorView& out) {
  heads.out = heads_of(out.strides(), out.mutable_data_ptr(), args.dtype, args.rotary_offset);
}

inline void set_in_place(const RotaryArgs& args, RotatedHeads& heads, const TensorView& x) {
  set_output(args, heads, x);
  heads.in.data = heads.out.data;  // mutable_data_ptr moves the memory of a copy-on-write tensor
}

// `stored` goes to this cache, from a channel on.
inline void set_cache(StoredHeads& stored, const TensorView& cache, int64_t first_channel) {
  char* const data = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t bytes = first_channel * cache.element_size();
  stored.cache = data == nullptr ? nullptr : data + bytes;
}

// q goes to `out`, and the scales of its heads to `scale_out`, where these are given.
inline void set_float8_q(const RotaryArgs& args, Float8Heads& q, const OptionalTensor& out,
                         const OptionalTensor& scale_out) {
  if (out) q.out = heads_of(out->strides(), out->mutable_data_ptr(), args.dtype, 0);
  if (!scale_out) return;
  const auto strides = scale_out->strides();
  const bool packed = strides.size() == 2;
  q.own_scale = {static_cast<float*>(scale_out->mutable_data_ptr()), packed ? 0 : strides[0],
                 strides[packed ? 0 : 1], strides[packed ? 1 : 2]};
}

// The result for `heads` in a new tensor like x.
inline Tensor new_output(RotaryArgs& args, RotatedHeads& heads, const TensorView& x) {
  Tensor out = dense_like(x);
  set_output(args, heads, out);
  args.new_outputs = true;
  return out;
}

}  // namespace rope
