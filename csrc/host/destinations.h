// Where the results of a rotation by rows go: into what rotates, into given tensors, or, out of a
// packed one, into new tensors. `read` is what the operator reads and must not write.
#pragma once

#include <tuple>

#include "check/packed.h"
#include "check/rotation.h"
#include "check/written.h"
#include "host/outputs.h"

namespace rope {

template <size_t kRead>
void write_in_place(const RotaryInputs& in, RotaryArgs& args, const Named (&read)[kRead]) {
  check_order_stays(in.op, in.rotation);
  const Named written[] = {{in.q_name, in.q}, {"k", in.k}};
  check_written(in.op, written, read);
  set_in_place(args, args.q, in.q);
  if (in.k) set_in_place(args, args.k, *in.k);
}

// q_result, k_result: like q and k; k_result is null without k. `read` has q and k too.
template <size_t kRead>
void write_into(const TensorView& q_result, const TensorView* k_result, const RotaryInputs& in,
                RotaryArgs& args, const Named (&read)[kRead]) {
  const char* const q_result_name = in.k ? "out_q" : "out";
  check_like(in.op, q_result_name, q_result, in.q_name, in.q);
  if (in.k) check_like(in.op, "out_k", *k_result, "k", *in.k);
  const Named written[] = {{q_result_name, q_result}, {"out_k", k_result}};
  check_written(in.op, written, read);
  set_output(args, args.q, q_result);
  if (in.k) set_output(args, args.k, *k_result);
}

// q, k and v of qkv in new tensors; args has everything else, and v is that of its struct.
inline std::tuple<Tensor, Tensor, Tensor> new_parts(const TensorView& qkv, const Packing& packing,
                                                    RotaryArgs& args, RotatedHeads& v) {
  int64_t first = 0;
  const auto split = [&](RotatedHeads& x, int64_t heads) {
    x.heads = heads;
    x.in = packed_heads(qkv, qkv.const_data_ptr(), packing, first, args);
    first += heads;
    Tensor out = new_tokens(qkv, packing.token_dims, {packing.groups * heads, args.head_dim});
    x.out = heads_by_group(out, out.mutable_data_ptr(), heads, args);
    return out;
  };
  Tensor out_q = split(args.q, packing.q_heads);
  Tensor out_k = split(args.k, packing.kv_heads);
  return {std::move(out_q), std::move(out_k), split(v, packing.kv_heads)};
}

}  // namespace rope
