#include "check/packed.h"

namespace rope {

Packing check_packing(const char* op, const TensorView& qkv, std::optional<int64_t> kv_heads) {
  const bool by_group = !kv_heads;
  const int64_t token_dims = qkv.dim() - (by_group ? 3 : 2);
  if (token_dims != 1 && token_dims != 2) {
    refuse(op,
           by_group ? "qkv to have shape [B, S, Hk, Hq / Hk + 2, D] or [T, Hk, Hq / Hk + 2, D], as "
                      "kv_heads is None"
                    : "qkv to have shape [B, S, Hq + 2 Hk, D] or [T, Hq + 2 Hk, D], as kv_heads "
                      "is given",
           shape_text(qkv), by_group ? "[.., Hq + 2 Hk, D] needs kv_heads=Hk" : "");
  }
  const int64_t heads = qkv.size(qkv.dim() - 2);
  if (by_group) {
    const int64_t groups = qkv.size(token_dims);
    if (groups < 1 || heads < 3) {
      refuse(op, "qkv to have at least one group of at least 3 heads, of q, k and v",
             shape_text(qkv));
    }
    return {true, token_dims, groups, heads - 2, 1};
  }
  const bool in_range = *kv_heads >= 1 && *kv_heads <= heads;
  const int64_t of_q = in_range ? heads - 2 * *kv_heads : 0;
  if (of_q < 1 || of_q % *kv_heads != 0) {
    refuse(op,
           text("kv_heads Hk, at least 1, so that qkv has Hq + 2 Hk = ", heads,
                " heads, with Hq a multiple of Hk"),
           text(*kv_heads));
  }
  return {false, token_dims, 1, of_q, *kv_heads};
}

Packing check_packing(const char* op, int64_t q_heads, int64_t kv_heads, bool by_group,
                      int64_t token_dims) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (kv_heads < 1 || q_heads < 1 || q_heads > kMost || q_heads % kv_heads != 0) {
    refuse(op, "q_heads to be a multiple of kv_heads, both at least 1 and at most 2^30",
           text(q_heads, " and ", kv_heads));
  }
  if (by_group) return {true, token_dims, kv_heads, q_heads / kv_heads, 1};
  return {false, token_dims, 1, q_heads, kv_heads};
}

HeadsOfGroup::HeadsOfGroup(const TensorView& qkv, const Packing& packing, int64_t first,
                           int64_t count)
    : TensorView(qkv) {
  const int64_t dims = packing.token_dims, last = qkv.dim() - 1;
  for (int64_t d = 0; d < dims; ++d) {
    sizes_[d] = qkv.size(d);
    strides_[d] = qkv.stride(d);
  }
  sizes_[dims] = count;
  strides_[dims] = qkv.stride(last - 1);
  sizes_[dims + 1] = qkv.size(last);
  strides_[dims + 1] = qkv.stride(last);
  const auto* const data = static_cast<const char*>(qkv.const_data_ptr());
  if (data != nullptr) read_.data = data + first * strides_[dims] * qkv.element_size();
  read_.sizes = Sizes(sizes_, static_cast<size_t>(dims + 2));
  read_.strides = strides_;
}

void check_part(const char* op, const char* name, const TensorView& part, int64_t heads,
                int64_t token_dims, const char* x_name, const TensorView& x) {
  const int64_t channels = x.size(x.dim() - 1);
  bool fits = part.dim() == token_dims + 2 && part.size(token_dims) == heads &&
              part.size(token_dims + 1) == channels;
  std::string expected = "[";
  for (int64_t d = 0; d < token_dims; ++d) {
    fits = fits && part.size(d) == x.size(d);
    expected += text(x.size(d), ", ");
  }
  if (!fits) {
    refuse(op, text(name, " to have shape ", expected, heads, ", ", channels, "]"),
           shape_text(part));
  }
  check_dtype_like(op, name, part, x_name, x);
  check_device(op, name, part, x_name, x);
  check_last_stride(op, name, part);
}

}  // namespace rope
