// The whole surface of torch.ops.rope, on one screen.
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
//   q_weight       [D]: each head is normalised by itself; or [H, D]: all heads of a token
//                  together; k_weight [D] or [Hk, D]; of q's dtype or float32
//
// (a!): written in place. What autograd has to know of that is in rope_ext/_engine/writes.py.
#include <torch/csrc/stable/library.h>

#include <deque>
#include <stdexcept>

#include "operators.h"

namespace {

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

void define(StableLibrary& m) {
  // -> x rotated, of x's shape, dtype and order of dimensions
  m.def(
      "apply_rotary(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
      "bool? interleaved_out=None, bool inverse=False) -> Tensor");
  m.def(
      "apply_rotary_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
      "bool? interleaved_out=None, bool inverse=False) -> (Tensor, Tensor)");
  m.def(
      "apply_rotary_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
      "bool? interleaved_out=None, bool inverse=False) -> ()");
  m.def(
      "apply_rotary_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, "
      "Tensor? position_ids=None, *, int? rotary_dim=None, int rotary_offset=0, "
      "bool interleaved=False, bool? interleaved_out=None, bool inverse=False) -> ()");
  // into tensors like x, or like q and k, that share no memory with what is read
  m.def(
      "apply_rotary.out(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
      "bool? interleaved_out=None, bool inverse=False, Tensor(a!) out) -> ()");
  m.def(
      "apply_rotary_qk.out(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids=None, "
      "*, int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
      "bool? interleaved_out=None, bool inverse=False, Tensor(a!) out_q, Tensor(b!) out_k) -> ()");

  // In place, and k as it is then, and v [.., Hk, D], to the caches; float8: divided by a scale,
  // float32 of one element or [Hk]
  m.def(
      "apply_rotary_qk_append_kv_(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, "
      "Tensor(d!) v_cache, Tensor slot_mapping, Tensor cos, Tensor sin, "
      "Tensor? position_ids=None, *, Tensor? k_scale=None, Tensor? v_scale=None, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, bool inverse=False) "
      "-> ()");
  // The last R channels of q and k_pe [B, S, R] or [T, R] (or with one head) in place, and
  // kv_c [.., rank] | k_pe to kv_cache [blocks, block_size, rank + R]; scale: one element
  m.def(
      "apply_rotary_mla_append_(Tensor(a!) q, Tensor(b!) k_pe, Tensor kv_c, Tensor(c!) kv_cache, "
      "Tensor slot_mapping, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "Tensor? scale=None, bool interleaved=False, bool? interleaved_out=None) -> ()");

  // -> cos, sin: [length, P] and [*position_ids.shape, P]; float32 unless dtype says otherwise.
  // position_ids: floating too; with axes [A, ...], which gives [..., P]
  m.def(
      "cos_sin_cache(Tensor inv_freq, SymInt length, *, SymInt start=0, "
      "float attention_scaling=1.0, ScalarType? dtype=None) -> (Tensor, Tensor)");
  m.def(
      "cos_sin(Tensor inv_freq, Tensor position_ids, Tensor? axes=None, *, "
      "float attention_scaling=1.0, ScalarType? dtype=None) -> (Tensor, Tensor)");

  // Gradients that autograd calls. -> grad of cos and sin, of cos's shape and dtype, from the
  // gradient of the rotated q (and k); token_order, row_offsets: the tokens of each row, where
  // positions were given (int64 [B * S], [L + 1])
  m.def(
      "apply_rotary_table_backward(Tensor grad_q, Tensor q, Tensor? grad_k, Tensor? k, Tensor cos, "
      "Tensor? token_order=None, Tensor? row_offsets=None, *, int? rotary_dim=None, "
      "int rotary_offset=0, bool interleaved=False, bool? interleaved_out=None, "
      "bool inverse=False) -> (Tensor, Tensor)");
  // -> grad of inv_freq [P], from grad_cos, grad_sin [*, P]
  m.def(
      "cos_sin_backward(Tensor grad_cos, Tensor grad_sin, Tensor inv_freq, "
      "Tensor? position_ids=None, Tensor? axes=None, *, SymInt start=0, "
      "float attention_scaling=1.0) -> Tensor");

  // -> q and k rotated by apply_rotary_qk with the rows of cos_sin, which are computed as it goes;
  // position_ids: of any value, floating too, with axes a leading A; None: 0, 1, 2, ...
  m.def(
      "apply_rotary_qk_at(Tensor q, Tensor k, Tensor inv_freq, Tensor? position_ids=None, "
      "Tensor? axes=None, *, float attention_scaling=1.0, int rotary_offset=0, "
      "bool interleaved=False, bool? interleaved_out=None, bool inverse=False) -> (Tensor, "
      "Tensor)");
  m.def(
      "apply_rotary_qk_at_(Tensor(a!) q, Tensor(b!) k, Tensor inv_freq, Tensor? position_ids=None, "
      "Tensor? axes=None, *, float attention_scaling=1.0, int rotary_offset=0, "
      "bool interleaved=False, bool? interleaved_out=None, bool inverse=False) -> ()");

  // -> q and k normalised by RMSNorm, then rotated
  m.def(
      "rms_norm_rotary_qk(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, "
      "Tensor sin, Tensor? position_ids=None, *, float eps=1e-6, bool unit_offset=False, "
      "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
      "bool? interleaved_out=None, bool inverse=False) -> (Tensor, Tensor)");
  // -> grad of q, k, q_weight and k_weight, from the gradients of the two results; without one of
  // these, zeros for its tensor and weight
  m.def(
      "rms_norm_rotary_qk_backward(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, "
      "Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? position_ids=None, *, "
      "float eps=1e-6, bool unit_offset=False, int? rotary_dim=None, int rotary_offset=0, "
      "bool interleaved=False, bool? interleaved_out=None, bool inverse=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

// Each function works on every device, and refuses those that this build has no kernels for.
void implement(StableLibrary& m) {
  m.impl("apply_rotary", TORCH_BOX(&rope::apply_rotary));
  m.impl("apply_rotary_qk", TORCH_BOX(&rope::apply_rotary_qk));
  m.impl("apply_rotary_", TORCH_BOX(&rope::apply_rotary_));
  m.impl("apply_rotary_qk_", TORCH_BOX(&rope::apply_rotary_qk_));
  m.impl("apply_rotary.out", TORCH_BOX(&rope::apply_rotary_out));
  m.impl("apply_rotary_qk.out", TORCH_BOX(&rope::apply_rotary_qk_out));
  m.impl("apply_rotary_qk_append_kv_", TORCH_BOX(&rope::apply_rotary_qk_append_kv_));
  m.impl("apply_rotary_mla_append_", TORCH_BOX(&rope::apply_rotary_mla_append_));
  m.impl("cos_sin_cache", TORCH_BOX(&rope::cos_sin_cache));
  m.impl("cos_sin", TORCH_BOX(&rope::cos_sin));
  m.impl("apply_rotary_table_backward", TORCH_BOX(&rope::apply_rotary_table_backward));
  m.impl("cos_sin_backward", TORCH_BOX(&rope::cos_sin_backward));
  m.impl("apply_rotary_qk_at", TORCH_BOX(&rope::apply_rotary_qk_at));
  m.impl("apply_rotary_qk_at_", TORCH_BOX(&rope::apply_rotary_qk_at_));
  m.impl("rms_norm_rotary_qk", TORCH_BOX(&rope::rms_norm_rotary_qk));
  m.impl("rms_norm_rotary_qk_backward", TORCH_BOX(&rope::rms_norm_rotary_qk_backward));
}

// StableLibrary does not look whether it got the namespace, and crashes without.
void check_namespace_is_free() {
  TorchLibraryHandle handle;
  if (aoti_torch_library_init_def("rope", __FILE__, __LINE__, &handle) != TORCH_SUCCESS) {
    throw std::runtime_error("another library has registered the namespace rope of operators");
  }
  aoti_torch_delete_library_object(handle);
}

}  // namespace

// Not by initializers of static variables, as STABLE_TORCH_LIBRARY has it: what is thrown there
// ends the process.
bool rope::register_operators() {
  static bool registered = false;
  if (registered) return false;
  check_namespace_is_free();
  using Kind = StableLibrary::Kind;
  static std::deque<StableTorchLibraryInit> libraries;  // registered for as long as they live
  libraries.emplace_back(Kind::DEF, &define, "rope", nullptr, __FILE__, __LINE__);
  // Quantized tensors: refused by name, as any dtype but those above.
  for (const char* key : {"CPU", "CUDA", "QuantizedCPU", "QuantizedCUDA"}) {
    libraries.emplace_back(Kind::IMPL, &implement, "rope", key, __FILE__, __LINE__);
  }
  return registered = true;
}
