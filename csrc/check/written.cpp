// Further checks of the operators that write into tensors of the caller: q and k in place, or out.
#include <array>
#include <optional>

#include "check/overlap.h"
#include "check/parts.h"
#include "checks.h"

namespace rope {

namespace {

struct Named {
  const char* name;
  const TensorView* t;  // nullptr: not given
};

const TensorView* address(const std::optional<TensorView>& t) { return t ? &*t : nullptr; }

bool is_empty(const Named& x) { return x.t == nullptr || x.t->numel() == 0; }

// A tensor whose last stride is 1.
Footprint footprint_of(const TensorView& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t bytes = t.element_size();
  const size_t last = sizes.size() - 1;
  const bool runs = strides[last] == 1 || sizes[last] == 1;
  Footprint out(t.const_data_ptr(), bytes * (runs ? sizes[last] : 1));
  for (size_t d = 0; d < sizes.size() - (runs ? 1 : 0); ++d) {
    out.add_dim(sizes[d], strides[d] * bytes);
  }
  return out;
}

// The footprints of tensors, each found once; none of those that are empty.
template <size_t kCount>
std::array<std::optional<Footprint>, kCount> footprints_of(const Named (&tensors)[kCount]) {
  std::array<std::optional<Footprint>, kCount> out;
  for (size_t i = 0; i < kCount; ++i) {
    if (!is_empty(tensors[i])) out[i] = footprint_of(*tensors[i].t);
  }
  return out;
}

// No element of `written` may be written twice, or read while it is written.
template <size_t kWritten, size_t kRead>
void check_written(const char* op, const Named (&written)[kWritten], const Named (&read)[kRead]) {
  const auto written_at = footprints_of(written);
  const auto read_at = footprints_of(read);
  for (size_t w = 0; w < kWritten; ++w) {
    if (!written_at[w]) continue;
    if (overlaps_itself(*written_at[w])) {
      const TensorView& t = *written[w].t;
      refuse(op, text(written[w].name, " to have no two elements in one place, as it is written"),
             text("strides ", shape_text(t.strides()), " for shape ", shape_text(t)));
    }
    for (size_t r = 0; r < kRead; ++r) {
      if (read_at[r] && overlap(*written_at[w], *read_at[r])) {
        refuse(
            op,
            text(read[r].name, " to share no memory with ", written[w].name, ", which is written"),
            "overlapping tensors");
      }
    }
  }
  for (size_t a = 0; a < kWritten; ++a) {
    for (size_t b = a + 1; b < kWritten; ++b) {
      if (written_at[a] && written_at[b] && overlap(*written_at[a], *written_at[b])) {
        refuse(op,
               text(written[a].name, " and ", written[b].name,
                    " to share no memory, as both are written"),
               "overlapping tensors");
      }
    }
  }
}

void check_order_stays(const char* op, const RotaryOptions& options) {
  const bool interleaved = options.interleaved;
  if (interleaved_out(options) != interleaved) {
    const auto name = [](bool value) { return value ? "True" : "False"; };
    refuse(op,
           text("interleaved_out to be None or interleaved, ", name(interleaved),
                ", as a rotation in place leaves the pairs where they are"),
           name(!interleaved));
  }
}

}  // namespace

void check_in_place(const RotaryInputs& in) {
  check_order_stays(in.op, in.options);
  const Named written[] = {{in.q_name(), &in.q}, {"k", address(in.k)}};
  const Named read[] = {
      {"cos", &in.cos}, {"sin", &in.sin}, {"position_ids", address(in.position_ids)}};
  check_written(in.op, written, read);
}

void check_in_place(const RotaryAtInputs& in) {
  check_order_stays(in.angles.op, in.options);
  const Named written[] = {{"q", &in.q}, {"k", &in.k}};
  const Named read[] = {{"inv_freq", &in.angles.inv_freq},
                        {"position_ids", address(in.angles.position_ids)},
                        {"axes", address(in.angles.axes)}};
  check_written(in.angles.op, written, read);
}

void check_out(const RotaryInputs& in, const TensorView& out_q, const TensorView* out_k) {
  const char* const q_name = in.k ? "q" : "x";
  const Named written[] = {{in.k ? "out_q" : "out", &out_q}, {"out_k", out_k}};
  const Named like[] = {{q_name, &in.q}, {"k", address(in.k)}};
  for (int i = 0; i < 2; ++i) {
    if (written[i].t == nullptr) continue;
    check_sizes_like(in.op, written[i].name, *written[i].t, like[i].name, *like[i].t);
    check_dtype_like(in.op, written[i].name, *written[i].t, like[i].name, *like[i].t);
    check_device(in.op, written[i].name, *written[i].t, like[i].name, *like[i].t);
    check_last_stride(in.op, written[i].name, *written[i].t);
  }
  const Named read[] = {like[0],
                        like[1],
                        {"cos", &in.cos},
                        {"sin", &in.sin},
                        {"position_ids", address(in.position_ids)}};
  check_written(in.op, written, read);
}

void check_append_written(const AppendInputs& in) {
  const RotaryInputs& rotary = in.rotary;
  const Named written[] = {{"q", &rotary.q},
                           {"k", address(rotary.k)},
                           {"k_cache", &in.k_cache},
                           {"v_cache", &in.v_cache}};
  const Named read[] = {{"v", &in.v},
                        {"slot_mapping", &in.slot_mapping},
                        {"cos", &rotary.cos},
                        {"sin", &rotary.sin},
                        {"position_ids", address(rotary.position_ids)},
                        {"k_scale", address(in.k_scale)},
                        {"v_scale", address(in.v_scale)}};
  check_written(rotary.op, written, read);
}

void check_append_written(const LatentInputs& in) {
  const RotaryInputs& rotary = in.rotary;
  const Named written[] = {{"q", &rotary.q}, {"k_pe", &in.k_pe}, {"kv_cache", &in.kv_cache}};
  const Named read[] = {{"kv_c", &in.kv_c},
                        {"slot_mapping", &in.slot_mapping},
                        {"cos", &rotary.cos},
                        {"sin", &rotary.sin},
                        {"position_ids", address(rotary.position_ids)},
                        {"scale", address(in.scale)}};
  check_written(rotary.op, written, read);
}

}  // namespace rope
