// Further checks of the operators that write into tensors of the caller: q and k in place, or out.
#include "check_parts.h"
#include "checks.h"
#include "overlap.h"

namespace rope {

namespace {

struct Named {
  const char* name;
  const Tensor* t;  // nullptr: not given
};

bool is_empty(const Named& x) { return x.t == nullptr || x.t->numel() == 0; }

// A tensor whose last stride is 1.
Footprint footprint_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const size_t last = sizes.size() - 1;
  const bool runs = strides[last] == 1 || sizes[last] == 1;
  Footprint out(t.const_data_ptr(), bytes * (runs ? sizes[last] : 1));
  for (size_t d = 0; d < sizes.size() - (runs ? 1 : 0); ++d) {
    out.add_dim(sizes[d], strides[d] * bytes);
  }
  return out;
}

// No element of `written` may be written twice, or read while it is written.
template <size_t kRead>
void check_written(const char* op, const Named (&written)[2], const Named (&read)[kRead]) {
  for (const Named& w : written) {
    if (is_empty(w)) continue;
    const Footprint bytes = footprint_of(*w.t);
    if (overlaps_itself(bytes)) {
      refuse(op, text(w.name, " to have no two elements in one place, as it is written"),
             text("strides ", shape_text(w.t->strides()), " for shape ", shape_text(*w.t)));
    }
    for (const Named& r : read) {
      if (!is_empty(r) && overlap(bytes, footprint_of(*r.t))) {
        refuse(op, text(r.name, " to share no memory with ", w.name, ", which is written"),
               "overlapping tensors");
      }
    }
  }
  if (!is_empty(written[0]) && !is_empty(written[1]) &&
      overlap(footprint_of(*written[0].t), footprint_of(*written[1].t))) {
    refuse(
        op,
        text(written[0].name, " and ", written[1].name, " to share no memory, as both are written"),
        "overlapping tensors");
  }
}

}  // namespace

void check_in_place(const RotaryInputs& in) {
  const bool interleaved = in.options.interleaved;
  if (interleaved_out(in.options) != interleaved) {
    const auto name = [](bool value) { return value ? "True" : "False"; };
    refuse(in.op,
           text("interleaved_out to be None or interleaved, ", name(interleaved),
                ", as a rotation in place leaves the pairs where they are"),
           name(!interleaved));
  }
  const OptionalTensor& ids = in.position_ids;
  const Named written[] = {{in.k ? "q" : "x", &in.q}, {"k", in.k}};
  const Named read[] = {
      {"cos", &in.cos}, {"sin", &in.sin}, {"position_ids", ids ? &*ids : nullptr}};
  check_written(in.op, written, read);
}

void check_out(const RotaryInputs& in, const Tensor& out_q, const Tensor* out_k) {
  const char* const q_name = in.k ? "q" : "x";
  const Named written[] = {{in.k ? "out_q" : "out", &out_q}, {"out_k", out_k}};
  const Named like[] = {{q_name, &in.q}, {"k", in.k}};
  for (int i = 0; i < 2; ++i) {
    if (written[i].t == nullptr) continue;
    check_sizes_like(in.op, written[i].name, *written[i].t, like[i].name, *like[i].t);
    check_dtype_like(in.op, written[i].name, *written[i].t, like[i].name, *like[i].t);
    check_device(in.op, written[i].name, *written[i].t, like[i].name, *like[i].t);
    check_last_stride(in.op, written[i].name, *written[i].t);
  }
  const OptionalTensor& ids = in.position_ids;
  const Named read[] = {like[0],
                        like[1],
                        {"cos", &in.cos},
                        {"sin", &in.sin},
                        {"position_ids", ids ? &*ids : nullptr}};
  check_written(in.op, written, read);
}

}  // namespace rope
