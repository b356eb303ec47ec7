// The operators that rotate in place and write to a paged cache: checks, pointers, kernel.
#include "checks.h"
#include "host/device.h"
#include "operators.h"

namespace rope {

namespace {

// What is written has its place only now: a copy-on-write tensor moves.
void set_cache(StoredHeads& stored, const Tensor& cache, int64_t first_channel) {
  char* const data = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t bytes = first_channel * static_cast<int64_t>(cache.element_size());
  stored.cache = data == nullptr ? nullptr : data + bytes;
}

void rotate_and_append(const TensorView& where, const AppendArgs& args) {
  run(where, args, &cpu::apply_rotary_append, &cuda::apply_rotary_append);
}

}  // namespace

void apply_rotary_qk_append_kv_(const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& k_cache, const Tensor& v_cache,
                                const Tensor& slot_mapping, const Tensor& cos, const Tensor& sin,
                                const OptionalTensor& position_ids, const OptionalTensor& k_scale,
                                const OptionalTensor& v_scale, OptionalInt rotary_dim,
                                int64_t rotary_offset, bool interleaved, bool inverse) {
  const RotaryOptions options{rotary_dim, rotary_offset, interleaved, std::nullopt, inverse};
  const AppendInputs in{{"apply_rotary_qk_append_kv_", q, k, cos, sin, view(position_ids), options},
                        v,
                        k_cache,
                        v_cache,
                        slot_mapping,
                        view(k_scale),
                        view(v_scale)};
  check_device_supported(in.rotary.op, in.rotary.q);
  AppendArgs args = check_append(in);
  check_append_written(in);
  set_in_place(args.rotary, args.rotary.q, q);
  set_in_place(args.rotary, args.rotary.k, k);
  args.k.in.data = k.mutable_data_ptr();
  set_cache(args.k, k_cache, 0);
  set_cache(args.v, v_cache, 0);
  rotate_and_append(in.rotary.q, args);
}

void apply_rotary_mla_append_(const Tensor& q, const Tensor& k_pe, const Tensor& kv_c,
                              const Tensor& kv_cache, const Tensor& slot_mapping, const Tensor& cos,
                              const Tensor& sin, const OptionalTensor& position_ids,
                              const OptionalTensor& scale, bool interleaved,
                              OptionalBool interleaved_out) {
  const RotaryOptions options{std::nullopt, 0, interleaved, interleaved_out, false};
  const LatentInputs in{
      {"apply_rotary_mla_append_", q, std::nullopt, cos, sin, view(position_ids), options, "q"},
      k_pe,
      kv_c,
      kv_cache,
      slot_mapping,
      view(scale)};
  check_device_supported(in.rotary.op, in.rotary.q);
  AppendArgs args = check_append(in);
  check_append_written(in);
  set_in_place(args.rotary, args.rotary.q, q);
  const Heads<const void*>& k = args.k.in;
  void* const k_data = k_pe.mutable_data_ptr();
  args.rotary.k.in.data = args.k.in.data = k_data;
  args.rotary.k.out = {k_data, k.stride_b, k.stride_s, k.stride_h};
  set_cache(args.v, kv_cache, 0);
  set_cache(args.k, kv_cache, args.v.channels);
  rotate_and_append(in.rotary.q, args);
}

}  // namespace rope
