// apply_rotary_qk_append_kv_: rotation in place, and k and v to a paged cache; and
// rms_norm_rotary_qk_append_kv_, which normalises them before.
#include "check/cache.h"
#include "check/norm.h"
#include "check/rotation.h"
#include "check/written.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

struct Inputs {
  RotaryInputs rotary;                         // q and k
  TensorView v;                                // of k's shape
  TensorView k_cache, v_cache;                 // [blocks, block_size, Hk, D]
  TensorView slot_mapping;                     // [B, S], [B * S] or [T], the last two or shorter
  std::optional<TensorView> k_scale, v_scale;  // one, or [Hk]
  std::optional<TensorView> q_out, q_scale, q_scale_out;  // like q; one, or [H]; [B, S, H]
  // With norm, which may write v: [D], or [H, D] and [Hk, D]
  std::optional<TensorView> q_weight = {}, k_weight = {};
};

// Everything but what is written.
AppendArgs check(const Inputs& in) {
  const char* const op = in.rotary.op;
  const TensorView &q = in.rotary.q, &k = *in.rotary.k;
  AppendArgs args{};
  args.rotary = check_apply_rotary(in.rotary);
  check_sizes_like(op, "v", in.v, "k", k);
  check_dtype_like(op, "v", in.v, "k", k);
  check_device(op, "v", in.v, "q", q);
  check_last_stride(op, "v", in.v);

  const int64_t heads = args.rotary.k.heads, channels = args.rotary.head_dim;
  args.cache_dtype = check_cache_dtype(op, "k_cache", in.k_cache, q);
  check_cache(op, "k_cache", in.k_cache, q, {heads, channels});
  check_dtype_like(op, "v_cache", in.v_cache, "k_cache", in.k_cache);
  check_sizes_like(op, "v_cache", in.v_cache, "k_cache", in.k_cache);
  check_device(op, "v_cache", in.v_cache, "q", q);
  check_last_stride(op, "v_cache", in.v_cache);
  args.blocks = in.k_cache.size(0);
  args.block_size = in.k_cache.size(1);
  const auto stored = [&](const TensorView& x, const TensorView& cache) {
    StoredHeads out{};
    out.in = heads_of(x.strides(), x.const_data_ptr(), args.rotary.dtype, 0);
    out.heads = heads;
    out.channels = channels;
    out.stride_block = cache.stride(0);
    out.stride_offset = cache.stride(1);
    out.stride_h = cache.stride(2);
    return out;
  };
  args.k = stored(k, in.k_cache);
  args.v = stored(in.v, in.v_cache);
  check_scale(op, "k_scale", in.k_scale, in.k_cache, q, args, args.k);
  check_scale(op, "v_scale", in.v_scale, in.v_cache, q, args, args.v);
  check_float8_q(op, in.q_out, in.q_scale, in.q_scale_out, q, args);
  check_slots(op, in.slot_mapping, q, args);
  return args;
}

void check_memory(const Inputs& in) {
  const RotaryInputs& rotary = in.rotary;
  const bool writes_v = in.k_weight.has_value();
  const Named written[] = {{"q", rotary.q},
                           {"k", rotary.k},
                           {"k_cache", in.k_cache},
                           {"v_cache", in.v_cache},
                           {"v", writes_v ? &in.v : nullptr},
                           {"q_out", in.q_out},
                           {"q_scale_out", in.q_scale_out}};
  const Named read[] = {{"v", writes_v ? nullptr : &in.v},
                        {"q_scale", in.q_scale},
                        {"slot_mapping", in.slot_mapping},
                        {"cos", rotary.cos},
                        {"sin", rotary.sin},
                        {"position_ids", rotary.position_ids},
                        {"k_scale", in.k_scale},
                        {"v_scale", in.v_scale},
                        {"q_weight", in.q_weight},
                        {"k_weight", in.k_weight}};
  check_written(rotary.op, written, read);
}

void set_written(AppendArgs& args, const Tensor& q, const Tensor& k, const Tensor& k_cache,
                 const Tensor& v_cache, const Float8Query<OptionalTokenTensor>& float8_q) {
  set_in_place(args.rotary, args.rotary.q, q);
  set_float8_q(args.rotary, args.float8_q, float8_q.q_out, float8_q.q_scale_out);
  set_in_place(args.rotary, args.rotary.k, k);
  args.k.in.data = k.mutable_data_ptr();
  set_cache(args.k, k_cache, 0);
  set_cache(args.v, v_cache, 0);
}

void apply_rotary_qk_append_kv_(const TokenTensor& q, const TokenTensor& k, const TokenTensor& v,
                                const CacheTensor& k_cache, const CacheTensor& v_cache,
                                const Tensor& slot_mapping, const Rows& rows,
                                const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                const Float8Query<OptionalTokenTensor>& float8_q,
                                const RotationOfKv& rotation) {
  const char* const op = "apply_rotary_qk_append_kv_";
  const Inputs in{{op, q, &k, rows, rotation},
                  v,
                  k_cache,
                  v_cache,
                  slot_mapping,
                  view(k_scale),
                  view(v_scale),
                  view(float8_q.q_out),
                  view(float8_q.q_scale),
                  view(float8_q.q_scale_out)};
  check_device_supported(op, in.rotary.q);
  AppendArgs args = check(in);
  check_memory(in);
  set_written(args, q, k, k_cache, v_cache, float8_q);
  run(in.rotary.q, args);
}

void rms_norm_rotary_qk_append_kv_(const TokenTensor& q, const TokenTensor& k, const TokenTensor& v,
                                   const CacheTensor& k_cache, const CacheTensor& v_cache,
                                   const Tensor& slot_mapping, const NormWeights& weights,
                                   const Rows& rows, const NormOptions& norm, bool norm_v,
                                   const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                   const Float8Query<OptionalTokenTensor>& float8_q,
                                   const RotationOfKv& rotation) {
  const char* const op = "rms_norm_rotary_qk_append_kv_";
  const Inputs in{{op, q, &k, rows, rotation},
                  v,
                  k_cache,
                  v_cache,
                  slot_mapping,
                  view(k_scale),
                  view(v_scale),
                  view(float8_q.q_out),
                  view(float8_q.q_scale),
                  view(float8_q.q_scale_out),
                  weights.q_weight,
                  weights.k_weight};
  check_device_supported(op, in.rotary.q);
  RmsNormAppendArgs args{};
  args.append = check(in);
  args.norm = check_norm(in.rotary, weights.q_weight, &weights.k_weight, norm, args.append.rotary);
  check_memory(in);
  set_written(args.append, q, k, k_cache, v_cache, float8_q);
  args.append.v.in.data = v.mutable_data_ptr();
  if (norm_v) {
    args.v.heads = args.append.v.heads;
    set_in_place(args.append.rotary, args.v, v);
    args.v.in = {args.v.out.data, args.v.out.stride_b, args.v.out.stride_s, args.v.out.stride_h};
  }
  run(in.rotary.q, args);
}

}  // namespace

std::vector<Operator> kv_cache_operators() {
  return {boxed<&apply_rotary_qk_append_kv_>("apply_rotary_qk_append_kv_"),
          boxed<&rms_norm_rotary_qk_append_kv_>("rms_norm_rotary_qk_append_kv_")};
}

}  // namespace rope
