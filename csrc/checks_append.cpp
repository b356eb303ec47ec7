// Checks of the operators that rotate and write to a paged cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check/parts.h"
#include "checks.h"

namespace rope {

using torch::headeronly::ScalarType;

namespace {

CacheDType check_cache_dtype(const char* op, const char* name, const TensorView& cache,
                             const TensorView& q) {
  switch (cache.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return CacheDType::Float8E4M3;
    case ScalarType::Float8_e5m2: return CacheDType::Float8E5M2;
    default: break;
  }
  if (cache.scalar_type() != q.scalar_type()) {
    refuse(op,
           text(name, " of q's dtype ", dtype_text(q.scalar_type()),
                ", or float8_e4m3fn or float8_e5m2"),
           dtype_text(cache.scalar_type()));
  }
  return CacheDType::OfModel;
}

// A cache with these sizes after those of blocks and of their tokens.
void check_cache(const char* op, const char* name, const TensorView& cache, const TensorView& q,
                 std::initializer_list<int64_t> of_token) {
  bool fits = cache.dim() == 2 + static_cast<int64_t>(of_token.size());
  std::string expected;
  int64_t d = 2;
  for (const int64_t size : of_token) {
    fits = fits && cache.size(d++) == size;
    expected += text(", ", size);
  }
  if (!fits) {
    refuse(op, text(name, " to have shape [blocks, block_size", expected, "]"), shape_text(cache));
  }
  check_device(op, name, cache, "q", q);
  check_last_stride(op, name, cache);
}

// One scale, or one a head; without it, 1.
void check_scale(const char* op, const char* name, const std::optional<TensorView>& scale,
                 const TensorView& cache, const TensorView& q, const AppendArgs& args,
                 StoredHeads& stored) {
  if (!scale) return;
  if (args.cache_dtype == CacheDType::OfModel) {
    refuse(op, text(name, " to be None for a cache that is not of float8"),
           text("one for a cache of ", dtype_text(cache.scalar_type())));
  }
  if (scale->scalar_type() != ScalarType::Float) {
    refuse(op, text(name, " to be float32"), dtype_text(scale->scalar_type()));
  }
  const bool a_head = scale->dim() == 1 && scale->size(0) == stored.heads;
  if (!a_head && (scale->dim() > 1 || scale->numel() != 1)) {
    refuse(op,
           stored.heads == 1 ? text(name, " to have one element")
                             : text(name, " to have one element, or shape [", stored.heads, "]"),
           shape_text(*scale));
  }
  check_device(op, name, *scale, "q", q);
  stored.scale = static_cast<const float*>(scale->const_data_ptr());
  stored.scale_stride_h = a_head ? scale->stride(0) : 0;
  look_at_values(*scale, [&](const TensorView& on_host) {
    const float* value = static_cast<const float*>(on_host.const_data_ptr());
    const int64_t step = on_host.dim() == 1 ? on_host.stride(0) : 0;
    for (int64_t i = 0; i < on_host.numel(); ++i) {
      const float each = value[i * step];
      if (std::isfinite(each) && each > 0) continue;
      refuse(op, text(name, " to be finite and above 0"), std::to_string(each));
    }
  });
}

// Each slot inside of the cache and none twice, for slots in host memory.
void check_slot_values(const char* op, const PositionIds& slots, const AppendArgs& args,
                       bool one_dim) {
  const int64_t capacity = args.blocks * args.block_size, seq = args.rotary.seq;
  const int64_t tokens = args.slot_count;
  const auto index = [&](int64_t token) {
    return one_dim ? text("[", token, "]") : text("[", token / seq, ", ", token % seq, "]");
  };
  std::vector<int64_t> of_tokens(tokens);
  int64_t last = -1;
  bool rising = true;  // then none is there twice
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = of_tokens[token] = entry_of(slots, token / seq, token % seq);
    if (slot < 0) continue;
    if (slot >= capacity) {
      refuse(op, text("slot_mapping below ", capacity, ", the slots of the cache, or negative"),
             text(slot, " at index ", index(token)));
    }
    rising = rising && last < slot;
    last = slot;
  }
  if (rising) return;
  std::vector<int64_t> sorted = of_tokens;
  std::sort(sorted.begin(), sorted.end());
  const auto stored = std::lower_bound(sorted.begin(), sorted.end(), 0);
  const auto twice = std::adjacent_find(stored, sorted.end());
  if (twice == sorted.end()) return;
  const auto first = std::find(of_tokens.begin(), of_tokens.end(), *twice);
  const auto second = std::find(first + 1, of_tokens.end(), *twice);
  refuse(op, "slot_mapping to have no slot twice",
         text(*twice, " at index ", index(first - of_tokens.begin()), " and at ",
              index(second - of_tokens.begin())));
}

// args has everything but the slots.
void check_slots(const char* op, const TensorView& slots, const TensorView& q, AppendArgs& args) {
  check_int(op, "slot_mapping", slots);
  check_device(op, "slot_mapping", slots, "q", q);
  const int64_t batch = args.rotary.batch, seq = args.rotary.seq;
  const bool packed = q.dim() == 3, one_dim = slots.dim() == 1;
  const bool fits =
      one_dim ? slots.size(0) <= batch * seq
              : !packed && slots.dim() == 2 && slots.size(0) == batch && slots.size(1) == seq;
  if (!fits) {
    refuse(op,
           packed ? text("slot_mapping to have shape [T] or less, with T = ", seq)
                  : text("slot_mapping to have shape [B, S], or [B * S] or less, with B = ", batch,
                         ", S = ", seq),
           shape_text(slots));
  }
  args.slots_seq = seq;
  args.slot_count = one_dim ? slots.size(0) : batch * seq;
  const auto entries_of = [&](const TensorView& t) {
    const int64_t stride_s = t.stride(t.dim() - 1);
    return PositionIds{t.const_data_ptr(), t.scalar_type() == ScalarType::Long,
                       one_dim ? seq * stride_s : t.stride(0), stride_s};
  };
  look_at_values(slots, [&](const TensorView& on_host) {
    check_slot_values(op, entries_of(on_host), args, one_dim);
  });
  args.slots = entries_of(slots);
}

// Latent attention has tables with one angle a pair alone: as many columns as k_pe has channels are
// one angle a channel.
void check_one_angle_a_pair(const char* op, const TensorView& cos, const TensorView& k_pe) {
  if (cos.dim() == 0 || k_pe.dim() == 0) return;
  const int64_t width = cos.size(cos.dim() - 1);
  if (width < 2 || width != k_pe.size(k_pe.dim() - 1)) return;
  refuse(
      op, text("cos to have half as many columns as k_pe has channels, ", width), shape_text(cos),
      text("of a table with one angle a channel, such as cat((freqs, freqs), -1), give cos[..., :",
           width / 2, "] and sin[..., :", width / 2, "]"));
}

// A tensor with one head a token, [.., channels] or, if `with_heads`, also [.., 1, channels],
// beside q [.., H, D]: as [B, S, 1, channels].
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

}  // namespace

AppendArgs check_append(const AppendInputs& in) {
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
  check_slots(op, in.slot_mapping, q, args);
  return args;
}

AppendArgs check_append(const LatentInputs& in) {
  const char* const op = in.rotary.op;
  const TensorView &q = in.rotary.q, &cos = in.rotary.cos;
  check_one_angle_a_pair(op, cos, in.k_pe);
  RotaryInputs rotary = in.rotary;
  if (q.dim() > 0 && cos.dim() > 0) {  // the last channels rotate
    rotary.options.rotary_offset = q.size(q.dim() - 1) - 2 * cos.size(cos.dim() - 1);
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
  args.k = {k, 1, rotary_dim, nullptr, in.kv_cache.stride(0), in.kv_cache.stride(1), 0, nullptr, 0};
  args.v = {latent, 1, rank, nullptr, in.kv_cache.stride(0), in.kv_cache.stride(1), 0, nullptr, 0};
  check_scale(op, "scale", in.scale, in.kv_cache, q, args, args.k);
  args.v.scale = args.k.scale;
  check_slots(op, in.slot_mapping, q, args);
  return args;
}

}  // namespace rope
