// Where the results of a rotation by rows go, besides new tensors: into what rotates, or into given
// tensors. `read` is what the operator reads and must not write.
#pragma once

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

}  // namespace rope
