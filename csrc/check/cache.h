// Checks of paged caches: dtype, shape, scales and slots.
#pragma once

#include <initializer_list>
#include <optional>

#include "args.h"
#include "tensor.h"

namespace rope {

// OfModel for all that is not float8.
CacheDType cache_dtype_of(ScalarType type);

// q's dtype, or float8.
CacheDType check_cache_dtype(const char* op, const char* name, const TensorView& cache,
                             const TensorView& q);

// cache: [blocks, block_size, *of_token]
void check_cache(const char* op, const char* name, const TensorView& cache, const TensorView& q,
                 std::initializer_list<int64_t> of_token);

// Sets the scale of `stored`: one, or one a head, float32. args has its cache_dtype.
void check_scale(const char* op, const char* name, const std::optional<TensorView>& scale,
                 const TensorView& cache, const TensorView& q, const AppendArgs& args,
                 StoredHeads& stored);

// Sets float8_q of args but for what is written. out: like q, of float8; scale: one or [H]; or
// scale_out: [B, S, H] or [T, H].
void check_float8_q(const char* op, const std::optional<TensorView>& out,
                    const std::optional<TensorView>& scale,
                    const std::optional<TensorView>& scale_out, const TensorView& q,
                    AppendArgs& args);

// slots [N]: each one of the `capacity` slots of a cache or negative, none twice.
PositionIds check_slots(const char* op, const TensorView& slots, const TensorView& cache,
                        int64_t capacity);

// Sets the slots of args, which has everything else. slots: [B, S], [B * S] or [T], the last two
// may be shorter.
void check_slots(const char* op, const TensorView& slots, const TensorView& q, AppendArgs& args);

}  // namespace rope
