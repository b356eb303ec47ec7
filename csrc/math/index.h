// Reads the entries of index tensors (positions, slots, axes, tokens), for the checks and for the
// kernels of every device.
//
// Another thread or process may write such a tensor during a call, after the checks. So a kernel
// reads an entry once, tests the value that it has read, and uses that value.
#pragma once

#include "args.h"
#include "host/compiler.h"

namespace rope {

// The entry of a tensor of int64 or, without `int64`, of int32.
ROPE_HOST_DEVICE int64_t index_at(const void* data, bool int64, int64_t at) {
  return int64 ? read_once(static_cast<const int64_t*>(data) + at)
               : read_once(static_cast<const int32_t*>(data) + at);
}

// The entry of token s of sequence b.
ROPE_HOST_DEVICE int64_t entry_of(const PositionIds& ids, int64_t b, int64_t s) {
  if (ids.data == nullptr) return s;
  return index_at(ids.data, ids.int64, b * ids.stride_b + s * ids.stride_s);
}

// Whether 0 <= index < count.
ROPE_HOST_DEVICE bool is_inside(int64_t index, int64_t count) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(count);
}

// The tokens that use one row of the gradient to a table: entries [begin, end) of token_order or,
// without it, of the batch. Empty if the offsets are no such range.
struct TokenRange {
  int64_t begin, end;
};

ROPE_HOST_DEVICE TokenRange tokens_of(const RotaryTableGradArgs& args, int64_t grad_b,
                                      int64_t row) {
  if (args.token_order != nullptr) {
    const int64_t begin = read_once(args.row_offsets + row);
    const int64_t end = read_once(args.row_offsets + row + 1);
    if (begin < 0 || begin > end || end > args.batch * args.seq) return {0, 0};
    return {begin, end};
  }
  if (row >= args.seq) return {0, 0};
  if (args.grad_batch == 1) return {0, args.batch};
  return {grad_b, grad_b + 1};
}

// Sets (b, s) to the token at entry `at` of the range of `row`; false if there is no such token.
ROPE_HOST_DEVICE bool find_token(const RotaryTableGradArgs& args, int64_t row, int64_t at,
                                 int64_t& b, int64_t& s) {
  b = at;
  s = row;
  if (args.token_order == nullptr) return true;
  const int64_t token = read_once(args.token_order + at);
  if (!is_inside(token, args.batch * args.seq)) return false;
  b = token / args.seq;
  s = token - b * args.seq;
  return true;
}

}  // namespace rope
