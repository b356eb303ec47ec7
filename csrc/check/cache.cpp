#include "check/cache.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check/parts.h"

namespace rope {

using torch::headeronly::ScalarType;

CacheDType cache_dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn: return CacheDType::Float8E4M3;
    case ScalarType::Float8_e5m2: return CacheDType::Float8E5M2;
    default: return CacheDType::OfModel;
  }
}

namespace {

struct Scale {
  const float* data;
  int64_t stride_h;
};

// One, or one for each of the heads; its values are above 0.
Scale check_scale(const char* op, const char* name, const TensorView& scale, const TensorView& q,
                  int64_t heads) {
  if (scale.scalar_type() != ScalarType::Float) {
    refuse(op, text(name, " to be float32"), dtype_text(scale.scalar_type()));
  }
  const bool a_head = scale.dim() == 1 && scale.size(0) == heads;
  if (!a_head && (scale.dim() > 1 || scale.numel() != 1)) {
    refuse(op,
           heads == 1 ? text(name, " to have one element")
                      : text(name, " to have one element, or shape [", heads, "]"),
           shape_text(scale));
  }
  check_device(op, name, scale, "q", q);
  look_at_values(scale, [&](const TensorView& on_host) {
    const float* value = static_cast<const float*>(on_host.const_data_ptr());
    const int64_t step = on_host.dim() == 1 ? on_host.stride(0) : 0;
    for (int64_t i = 0; i < on_host.numel(); ++i) {
      const float each = value[i * step];
      if (std::isfinite(each) && each > 0) continue;
      refuse(op, text(name, " to be finite and above 0"), std::to_string(each));
    }
  });
  return {static_cast<const float*>(scale.const_data_ptr()), a_head ? scale.stride(0) : 0};
}

}  // namespace

CacheDType check_cache_dtype(const char* op, const char* name, const TensorView& cache,
                             const TensorView& q) {
  const CacheDType dtype = cache_dtype_of(cache.scalar_type());
  if (dtype == CacheDType::OfModel && cache.scalar_type() != q.scalar_type()) {
    refuse(op,
           text(name, " of q's dtype ", dtype_text(q.scalar_type()),
                ", or float8_e4m3fn or float8_e5m2"),
           dtype_text(cache.scalar_type()));
  }
  return dtype;
}

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

void check_scale(const char* op, const char* name, const std::optional<TensorView>& scale,
                 const TensorView& cache, const TensorView& q, const AppendArgs& args,
                 StoredHeads& stored) {
  if (!scale) return;
  if (args.cache_dtype == CacheDType::OfModel) {
    refuse(op, text(name, " to be None for a cache that is not of float8"),
           text("one for a cache of ", dtype_text(cache.scalar_type())));
  }
  const auto [data, stride_h] = check_scale(op, name, *scale, q, stored.heads);
  stored.scale = data;
  stored.scale_stride_h = stride_h;
}

void check_float8_q(const char* op, const std::optional<TensorView>& out,
                    const std::optional<TensorView>& scale,
                    const std::optional<TensorView>& scale_out, const TensorView& q,
                    AppendArgs& args) {
  if (!out) {
    if (scale) refuse(op, "q_scale to be None without q_out", shape_text(*scale));
    if (scale_out) refuse(op, "q_scale_out to be None without q_out", shape_text(*scale_out));
    return;
  }
  Float8Heads& to = args.float8_q;
  to.dtype = cache_dtype_of(out->scalar_type());
  if (to.dtype == CacheDType::OfModel) {
    refuse(op, "q_out of float8_e4m3fn or float8_e5m2", dtype_text(out->scalar_type()));
  }
  check_sizes_like(op, "q_out", *out, "q", q);
  check_device(op, "q_out", *out, "q", q);
  check_last_stride(op, "q_out", *out);
  if (scale && scale_out) refuse(op, "q_scale or q_scale_out", "both");
  if (scale) {
    const auto [data, stride_h] = check_scale(op, "q_scale", *scale, q, args.rotary.q.heads);
    to.scale = data;
    to.scale_stride_h = stride_h;
  }
  if (!scale_out) return;
  if (scale_out->scalar_type() != ScalarType::Float) {
    refuse(op, "q_scale_out to be float32", dtype_text(scale_out->scalar_type()));
  }
  const TensorView::Sizes of_heads(q.sizes().data(), q.sizes().size() - 1),
      sizes = scale_out->sizes();
  if (!std::equal(sizes.begin(), sizes.end(), of_heads.begin(), of_heads.end())) {
    refuse(op,
           text("q_scale_out to have shape ", shape_text(of_heads), ", q's without its channels"),
           shape_text(*scale_out));
  }
  check_device(op, "q_scale_out", *scale_out, "q", q);
}

namespace {

// No slot is past the end of the cache, and none is there twice; `slots` are in host memory.
void check_slot_values(const char* op, const PositionIds& slots, int64_t capacity, int64_t seq,
                       int64_t tokens, bool one_dim) {
  const auto index = [&](int64_t token) {
    return one_dim ? text("[", token, "]") : text("[", token / seq, ", ", token % seq, "]");
  };
  std::vector<int64_t> of_tokens(tokens);
  int64_t last = -1;
  bool rising = true;  // if so, none is there twice
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

}  // namespace

PositionIds check_slots(const char* op, const TensorView& slots, const TensorView& cache,
                        int64_t capacity) {
  check_int(op, "slot_mapping", slots);
  check_device(op, "slot_mapping", slots, "k_cache", cache);
  if (slots.dim() != 1) refuse(op, "slot_mapping to have shape [N]", shape_text(slots));
  const int64_t tokens = slots.size(0);
  const auto entries_of = [&](const TensorView& t) {
    return PositionIds{t.const_data_ptr(), t.scalar_type() == ScalarType::Long, 0, t.stride(0)};
  };
  look_at_values(slots, [&](const TensorView& on_host) {
    check_slot_values(op, entries_of(on_host), capacity, tokens, tokens, true);
  });
  return entries_of(slots);
}

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
    check_slot_values(op, entries_of(on_host), args.blocks * args.block_size, seq, args.slot_count,
                      one_dim);
  });
  args.slots = entries_of(slots);
}

}  // namespace rope
