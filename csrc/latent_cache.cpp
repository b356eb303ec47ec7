// apply_rotary_mla_append_: rotation in place, and the latent kv_c | k_pe of multi-head latent
// attention to a paged cache.
#include "check/cache.h"
#include "check/rotation.h"
#include "check/written.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

struct Inputs {
  RotaryInputs rotary;              // q alone
  TensorView k_pe;                  // [B, S, R], [B, S, 1, R], [T, R] or [T, 1, R]
  TensorView kv_c;                  // [B, S, rank] or [T, rank]
  TensorView kv_cache;              // [blocks, block_size, rank + R]
  TensorView slot_mapping;          // [B, S], [B * S] or [T], the last two or shorter
  std::optional<TensorView> scale;  // one
  std::optional<TensorView> q_out, q_scale, q_scale_out;  // like q; one, or [H]; [B, S, H]
};

// Tables have one angle a pair. With as many columns as k_pe has channels, cos has one a channel.
void check_one_angle_a_pair(const char* op, const TensorView& cos, const TensorView& k_pe) {
  if (cos.dim() == 0 || k_pe.dim() == 0) return;
  const int64_t width = cos.size(cos.dim() - 1);
  if (width < 2 || width != k_pe.size(k_pe.dim() - 1)) return;
  refuse(
      op, text("cos to have half as many columns as k_pe has channels, ", width), shape_text(cos),
      text("of a table with one angle a channel, such as cat((freqs, freqs), -1), give cos[..., :",
           width / 2, "] and sin[..., :", width / 2, "]"));
}

// x: one head a token, [.., channels] or, if `with_heads`, [.., 1, channels], beside q [.., H, D].
// channels < 0: any number. The result is [B, S, 1, channels].
Heads<const void*> check_one_head(const char* op, const char* name, const TensorView& x,
                                  const TensorView& q, int64_t channels, bool with_heads) {
  const int64_t tokens_dim = q.dim() - 2, last = x.dim() - 1;
  bool fits =
      x.dim() == tokens_dim + 1 || (with_heads && x.dim() == q.dim() && x.size(tokens_dim) == 1);
  std::string tokens;
  for (int64_t d = 0; d < tokens_dim; ++d) {
    fits = fits && x.size(d) == q.size(d);
    tokens += text(q.size(d), ", ");
  }
  if (!fits || (channels >= 0 && x.size(last) != channels)) {
    const std::string width = channels >= 0 ? text(channels) : "rank";
    const std::string of_heads = with_heads ? text(" or [", tokens, "1, ", width, "]") : "";
    refuse(op, text(name, " to have shape [", tokens, width, "]", of_heads), shape_text(x));
  }
  check_dtype_like(op, name, x, "q", q);
  check_device(op, name, x, "q", q);
  check_last_stride(op, name, x);
  if (tokens_dim == 1) return {x.const_data_ptr(), 0, x.stride(0), 0};
  return {x.const_data_ptr(), x.stride(0), x.stride(1), 0};
}

// Everything but what is written.
AppendArgs check(const Inputs& in) {
  const char* const op = in.rotary.op;
  const TensorView &q = in.rotary.q, &cos = in.rotary.cos;
  check_one_angle_a_pair(op, cos, in.k_pe);
  RotaryInputs rotary = in.rotary;
  if (q.dim() > 0 && cos.dim() > 0) {  // the last channels rotate
    rotary.rotation.rotary_offset = q.size(q.dim() - 1) - 2 * cos.size(cos.dim() - 1);
  }
  AppendArgs args{};
  args.rotary = check_apply_rotary(rotary);
  const int64_t rotary_dim = args.rotary.rotary_dim;
  if (args.rotary.interleaved != args.rotary.interleaved_out && rotary_dim > kMostReordered) {
    refuse(op,
           text("interleaved_out to be None or interleaved where more than ", kMostReordered,
                " channels rotate, as all of a head are held at once"),
           text("the other order for ", rotary_dim));
  }

  const Heads<const void*> k = check_one_head(op, "k_pe", in.k_pe, q, rotary_dim, true);
  const Heads<const void*> latent = check_one_head(op, "kv_c", in.kv_c, q, -1, false);
  const int64_t rank = in.kv_c.size(in.kv_c.dim() - 1);
  args.cache_dtype = check_cache_dtype(op, "kv_cache", in.kv_cache, q);
  check_cache(op, "kv_cache", in.kv_cache, q, {rank + rotary_dim});
  args.blocks = in.kv_cache.size(0);
  args.block_size = in.kv_cache.size(1);
  args.latent = true;
  args.rotary.k.heads = 1;
  args.rotary.k.in = k;
  const auto stored = [&](const Heads<const void*>& x, int64_t channels) {
    StoredHeads out{};
    out.in = x;
    out.heads = 1;
    out.channels = channels;
    out.stride_block = in.kv_cache.stride(0);
    out.stride_offset = in.kv_cache.stride(1);
    return out;
  };
  args.k = stored(k, rotary_dim);
  args.v = stored(latent, rank);
  check_scale(op, "scale", in.scale, in.kv_cache, q, args, args.k);
  args.v.scale = args.k.scale;
  check_float8_q(op, in.q_out, in.q_scale, in.q_scale_out, q, args);
  check_slots(op, in.slot_mapping, q, args);
  return args;
}

void check_memory(const Inputs& in) {
  const RotaryInputs& rotary = in.rotary;
  const Named written[] = {{"q", rotary.q},
                           {"k_pe", in.k_pe},
                           {"kv_cache", in.kv_cache},
                           {"q_out", in.q_out},
                           {"q_scale_out", in.q_scale_out}};
  const Named read[] = {
      {"kv_c", in.kv_c},      {"slot_mapping", in.slot_mapping},     {"cos", rotary.cos},
      {"sin", rotary.sin},    {"position_ids", rotary.position_ids}, {"scale", in.scale},
      {"q_scale", in.q_scale}};
  check_written(rotary.op, written, read);
}

void apply_rotary_mla_append_(const Tensor& q, const Tensor& k_pe, const Tensor& kv_c,
                              const Tensor& kv_cache, const Tensor& slot_mapping, const Rows& rows,
                              const OptionalTensor& scale,
                              const Float8Query<OptionalTensor>& float8_q,
                              const PairOrder& rotation) {
  const char* const op = "apply_rotary_mla_append_";
  Inputs in{{op, q, nullptr, rows, rotation},
            k_pe,
            kv_c,
            kv_cache,
            slot_mapping,
            view(scale),
            view(float8_q.q_out),
            view(float8_q.q_scale),
            view(float8_q.q_scale_out)};
  in.rotary.q_name = "q";
  check_device_supported(op, in.rotary.q);
  AppendArgs args = check(in);
  check_memory(in);
  set_in_place(args.rotary, args.rotary.q, q);
  set_float8_q(args.rotary, args.float8_q, float8_q.q_out, float8_q.q_scale_out);
  const Heads<const void*>& k = args.k.in;
  void* const k_data = k_pe.mutable_data_ptr();
  args.rotary.k.in.data = args.k.in.data = k_data;
  args.rotary.k.out = {k_data, k.stride_b, k.stride_s, k.stride_h};
  set_cache(args.v, kv_cache, 0);
  set_cache(args.k, kv_cache, args.v.channels);
  run(in.rotary.q, args);
}

}  // namespace

std::vector<Operator> latent_cache_operators() {
  return {boxed<&apply_rotary_mla_append_>("apply_rotary_mla_append_")};
}

}  // namespace rope
