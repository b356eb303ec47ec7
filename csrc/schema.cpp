// All operators of torch.ops.rope. A name in braces stands for parameters that several operators
// have: their text is in packs.h.
//
//   x, q, k        [B, S, H, D] or packed [T, H, D]: float64, float32, float16 or bfloat16;
//                  any strides with the last one 1
//   cos, sin       a table [L, W], or a row for each token [1|B, S, W], packed [T, W] or
//                  [1, T, W]; any of these dtypes. W = P = R / 2, one angle a pair; or, with
//                  rotary_dim R given, also W = R
//   position_ids   rows of the table: int32 or int64 [S], [1|B, S] or [T]; None: 0, 1, 2, ...
//   rotary_offset  the channels [rotary_offset, rotary_offset + R) rotate, the others stay
//   interleaved    the order of the pairs in x; interleaved_out: in the result, None: the same.
//                  Tables with W = R have their columns in the order of the result (of x, if
//                  inverse), so that the backward is the transpose with the two orders swapped
//   inv_freq       [P], radians per token
//   axes           the axis of each pair among those of position_ids [A, ...]: int32 or int64 [P]
//   k_cache, ..    a paged KV cache [blocks, block_size, Hk, D], of the model's dtype or float8
//   slot_mapping   block * block_size + offset of each token: int32 or int64 [B, S], [B * S] or
//                  [T], the last two may be shorter; negative, or past the end: it is not stored
//   q_out          like q, of float8: all channels of q go there, and q itself stays as it is;
//                  divided by q_scale, float32 of one element or [H], or by a scale of each head
//                  of each token, which q_scale_out, float32 [B, S, H] or [T, H], receives
//   q_weight       [D]: each head is normalised by itself; or [H, D]: all heads of a token
//                  together; k_weight [D] or [Hk, D]; of q's dtype or float32
//
// (a!): written in place. What autograd has to know of that is in rope_ext/_engine/writes.py.
#include <torch/csrc/stable/library.h>

#include <deque>
#include <stdexcept>
#include <string>

#include "packs.h"
#include "registration.h"

namespace rope {

namespace {

constexpr const char* kSchemas[] = {
    // -> x rotated, of x's shape, dtype and order of dimensions
    "apply_rotary(Tensor x, {rows}, *, {rotation}) -> Tensor",
    "apply_rotary_qk(Tensor q, Tensor k, {rows}, *, {rotation}) -> (Tensor, Tensor)",
    "apply_rotary_(Tensor(a!) x, {rows}, *, {rotation}) -> ()",
    "apply_rotary_qk_(Tensor(a!) q, Tensor(b!) k, {rows}, *, {rotation}) -> ()",
    // into tensors like x, or like q and k, that share no memory with what is read
    "apply_rotary.out(Tensor x, {rows}, *, {rotation}, Tensor(a!) out) -> ()",
    "apply_rotary_qk.out(Tensor q, Tensor k, {rows}, *, {rotation}, Tensor(a!) out_q, "
    "Tensor(b!) out_k) -> ()",

    // Rotates x, and writes it to x_out, like x, of float8: divided by a scale of each group of
    // group_size channels, which scale_out, float32 [.., H, D / group_size], receives
    "apply_rotary_quantize(Tensor x, {rows}, *, int group_size=128, float eps=1e-10, "
    "bool power_of_two_scales=False, {rotation}, Tensor(a!) x_out, Tensor(b!) scale_out) -> ()",
    // qkv [.., Hq + 2 Hk, D] with kv_heads, Hk; or by group, [.., Hk, Hq / Hk + 2, D] -> q and k
    // rotated and v, [.., Hq, D] and [.., Hk, D], dense
    "apply_rotary_qkv(Tensor qkv, {rows}, *, int? kv_heads=None, {rotation}) -> (Tensor, Tensor, "
    "Tensor)",
    // -> grad of qkv, from the gradients of q, k and v; zeros for what is None
    "apply_rotary_qkv_backward(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, {rows}, *, "
    "int q_heads, int kv_heads, bool by_group=False, {rotation}) -> Tensor",

    // Rotates q and k in place, and writes the rotated k and v [.., Hk, D] to the caches; float8:
    // divided by a scale, float32 of one element or [Hk]
    "apply_rotary_qk_append_kv_(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, "
    "Tensor(d!) v_cache, Tensor slot_mapping, {rows}, *, Tensor? k_scale=None, "
    "Tensor? v_scale=None, {float8_q}, {rotation_of_kv}) -> ()",
    // The same with q and k normalised by RMSNorm before they rotate, and v, if norm_v, in place
    // too, without a weight
    "rms_norm_rotary_qk_append_kv_(Tensor(a!) q, Tensor(b!) k, Tensor(c!) v, Tensor(d!) k_cache, "
    "Tensor(e!) v_cache, Tensor slot_mapping, {weights}, {rows}, *, {norm}, bool norm_v=False, "
    "Tensor? k_scale=None, Tensor? v_scale=None, {float8_q}, {rotation_of_kv}) -> ()",
    // Rotates the last R channels of q, and k_pe [B, S, R] or [T, R] (or with one head), in place,
    // and writes kv_c [.., rank] | k_pe to kv_cache [blocks, block_size, rank + R]; scale: one
    // element
    "apply_rotary_mla_append_(Tensor(a!) q, Tensor(b!) k_pe, Tensor kv_c, Tensor(c!) kv_cache, "
    "Tensor slot_mapping, {rows}, *, Tensor? scale=None, {float8_q}, {pair_order}) -> ()",
    // Rotates the keys in the slots [N] of k_cache, in place, from old_position_ids [N] to
    // new_position_ids [N], by position * inv_freq; new_inv_freq [P]: the frequencies change too
    "shift_cached_k_(Tensor(a!) k_cache, Tensor slot_mapping, Tensor old_position_ids, "
    "Tensor new_position_ids, Tensor inv_freq, *, Tensor? new_inv_freq=None, "
    "float attention_scaling=1.0, {rotation_of_cache}) -> ()",

    // -> cos, sin: [length, P] and [*position_ids.shape, P]; float32 unless dtype says otherwise.
    // position_ids: floating too; with axes [A, ...], which gives [..., P]
    "cos_sin_cache(Tensor inv_freq, SymInt length, *, SymInt start=0, {table}) -> (Tensor, Tensor)",
    "cos_sin(Tensor inv_freq, Tensor position_ids, Tensor? axes=None, *, {table}) -> (Tensor, "
    "Tensor)",

    // Gradients that autograd calls. -> grad of cos and sin, of cos's shape and dtype, from the
    // gradient of the rotated q (and k); token_order, row_offsets: the tokens of each row, where
    // positions were given (int64 [B * S], [L + 1])
    "apply_rotary_table_backward(Tensor grad_q, Tensor q, Tensor? grad_k, Tensor? k, Tensor cos, "
    "Tensor? token_order=None, Tensor? row_offsets=None, *, {rotation}) -> (Tensor, Tensor)",
    // -> grad of inv_freq [P], from grad_cos, grad_sin [*, P]
    "cos_sin_backward(Tensor grad_cos, Tensor grad_sin, {angles}, *, SymInt start=0, "
    "float attention_scaling=1.0) -> Tensor",

    // -> q and k rotated as by apply_rotary_qk with the rows of cos_sin, without storing the rows;
    // position_ids: of any value, floating too, with axes a leading A; None: 0, 1, 2, ...
    "apply_rotary_qk_at(Tensor q, Tensor k, {angles}, *, float attention_scaling=1.0, "
    "{rotation_by_angles}) -> (Tensor, Tensor)",
    "apply_rotary_qk_at_(Tensor(a!) q, Tensor(b!) k, {angles}, *, float attention_scaling=1.0, "
    "{rotation_by_angles}) -> ()",

    // -> x, or q and k, normalised by RMSNorm, then rotated; weight: [D] or [H, D]
    "rms_norm_rotary(Tensor x, Tensor weight, {rows}, *, {norm}, {rotation}) -> Tensor",
    "rms_norm_rotary_qk(Tensor q, Tensor k, {weights}, {rows}, *, {norm}, {rotation}) -> (Tensor, "
    "Tensor)",
    "rms_norm_rotary_(Tensor(a!) x, Tensor weight, {rows}, *, {norm}, {rotation}) -> ()",
    "rms_norm_rotary_qk_(Tensor(a!) q, Tensor(b!) k, {weights}, {rows}, *, {norm}, {rotation}) -> "
    "()",
    "rms_norm_rotary.out(Tensor x, Tensor weight, {rows}, *, {norm}, {rotation}, Tensor(a!) out) "
    "-> ()",
    "rms_norm_rotary_qk.out(Tensor q, Tensor k, {weights}, {rows}, *, {norm}, {rotation}, "
    "Tensor(a!) out_q, Tensor(b!) out_k) -> ()",
    // -> grad of x and weight, from the gradient of the result
    "rms_norm_rotary_backward(Tensor grad_x, Tensor x, Tensor weight, {rows}, *, {norm}, "
    "{rotation}) -> (Tensor, Tensor)",
    // -> grad of q, k, q_weight and k_weight, from the gradients of the two results; if one of
    // these is None, zeros for its tensor and weight
    "rms_norm_rotary_qk_backward(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, {weights}, "
    "{rows}, *, {norm}, {rotation}) -> (Tensor, Tensor, Tensor, Tensor)",
    // The same out of qkv, and back: as apply_rotary_qkv; by group, weights are [D]
    "rms_norm_rotary_qkv(Tensor qkv, {weights}, {rows}, *, int? kv_heads=None, {norm}, "
    "{rotation}) -> (Tensor, Tensor, Tensor)",
    "rms_norm_rotary_qkv_backward(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, Tensor qkv, "
    "{weights}, {rows}, *, int? kv_heads=None, {norm}, {rotation}) -> (Tensor, Tensor, Tensor)",
};

// The schema with the text of packs.h in place of the braces.
std::string filled_in(std::string schema) {
  static const std::pair<std::string, std::string> packs[] = {
      {"{rows}", Rows::schema()},
      {"{rotation}", AnyRotation::schema()},
      {"{rotation_of_kv}", RotationOfKv::schema()},
      {"{rotation_of_cache}", RotationOfCache::schema()},
      {"{pair_order}", PairOrder::schema()},
      {"{rotation_by_angles}", RotationByAngles::schema()},
      {"{angles}", AngleSource::schema()},
      {"{table}", TableOptions::schema()},
      {"{weights}", NormWeights::schema()},
      {"{norm}", NormOptions::schema()},
      {"{float8_q}", Float8Query<OptionalTensor>::schema()},
  };
  for (const auto& [name, parameters] : packs) {
    const size_t at = schema.find(name);
    if (at != std::string::npos) schema.replace(at, name.size(), parameters);
  }
  return schema;
}

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

void define(StableLibrary& m) {
  for (const char* schema : kSchemas) m.def(filled_in(schema).c_str());
}

// Each function works on every device, and refuses those that this build has no kernels for.
void implement(StableLibrary& m) {
  for (const Operator& op : operators()) m.impl(op.name, op.function);
}

// The part of the operators that is the same on every device: rope_ext/_engine/fallback.py calls
// it.
void implement_without_kernels(StableLibrary& m) {
  for (const Operator& op : operators()) m.impl(op.name, op.without_kernel);
}

// StableLibrary does not check that it got the namespace, and crashes if it did not.
void check_is_free(const std::string& name) {
  TorchLibraryHandle handle;
  if (aoti_torch_library_init_def(name.c_str(), __FILE__, __LINE__, &handle) != TORCH_SUCCESS) {
    throw std::runtime_error("another library has registered the namespace " + name +
                             " of operators");
  }
  aoti_torch_delete_library_object(handle);
}

}  // namespace

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all = [] {
    std::vector<Operator> out;
    for (const auto family :
         {rotation_operators, qkv_operators, table_grad_operators, angles_operators,
          rotation_by_angles_operators, kv_cache_operators, latent_cache_operators,
          cached_keys_operators, quantize_operators, rms_norm_operators}) {
      const std::vector<Operator> its = family();
      out.insert(out.end(), its.begin(), its.end());
    }
    return out;
  }();
  return all;
}

// Not by the static initializers of STABLE_TORCH_LIBRARY: an exception in one ends the process.
bool register_operators(const std::string& name, bool for_cuda) {
  static bool registered = false;
  if (registered) return false;
  check_is_free(name);
  using Kind = StableLibrary::Kind;
  static std::deque<StableTorchLibraryInit> libraries;  // registered for as long as they live
  libraries.emplace_back(Kind::DEF, &define, name.c_str(), nullptr, __FILE__, __LINE__);
  // Quantized tensors too, so that the check of their dtype refuses them.
  std::vector<const char*> keys{"CPU", "QuantizedCPU", "QuantizedCUDA"};
  if (for_cuda) keys.push_back("CUDA");
  for (const char* key : keys) {
    libraries.emplace_back(Kind::IMPL, &implement, name.c_str(), key, __FILE__, __LINE__);
  }
  // Any key that no valid tensor has: quantized ones are refused.
  libraries.emplace_back(Kind::IMPL, &implement_without_kernels, name.c_str(), "QuantizedXPU",
                         __FILE__, __LINE__);
  return registered = true;
}

}  // namespace rope
