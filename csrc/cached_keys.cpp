// shift_cached_k_: keys of a paged cache get new positions where they are.
#include "check/angles.h"
#include "check/cache.h"
#include "check/heads.h"
#include "check/rotation.h"
#include "check/written.h"
#include "host/angle_tensors.h"
#include "host/device.h"
#include "host/outputs.h"
#include "registration.h"

namespace rope {

namespace {

struct Inputs {
  const char* op;
  TensorView k_cache;       // [blocks, block_size, Hk, D]
  TensorView slot_mapping;  // [N]
  AngleInputs from, to;     // their position_ids [N]
  Rotation rotation;
};

// Sets the data and the stride of the positions.
void check_positions(const AngleInputs& in, const TensorView& slots, TokenPositions& positions) {
  check_sizes_like(in.op, in.position_ids_name, *in.position_ids, "slot_mapping", slots);
  positions.data = in.position_ids->const_data_ptr();
  positions.stride_s = in.position_ids->stride(0);
}

// Everything but what is written, and the data of the frequencies.
ShiftArgs check(const Inputs& in) {
  const char* const op = in.op;
  const TensorView& cache = in.k_cache;
  check_device_supported(op, cache);
  if (cache.dim() != 4) {
    refuse(op, "k_cache to have shape [blocks, block_size, Hk, D]", shape_text(cache));
  }
  ShiftArgs args{};
  args.op = op;
  args.cache_dtype = cache_dtype_of(cache.scalar_type());
  const bool of_model = args.cache_dtype == CacheDType::OfModel;
  if (of_model && !dtype_of(cache.scalar_type())) {
    refuse(op, "k_cache to be float64, float32, float16, bfloat16, float8_e4m3fn or float8_e5m2",
           dtype_text(cache.scalar_type()));
  }
  args.dtype = of_model ? *dtype_of(cache.scalar_type()) : DType::Float32;
  check_last_stride(op, "k_cache", cache);
  args.blocks = cache.size(0);
  args.block_size = cache.size(1);
  args.head_dim = cache.size(3);
  args.slots = check_slots(op, in.slot_mapping, cache, args.blocks * args.block_size);
  args.batch = 1;
  args.seq = in.slot_mapping.size(0);

  for (const AngleInputs* angles : {&in.from, &in.to}) {
    check_device(op, angles->inv_freq_name, angles->inv_freq, "k_cache", cache);
  }
  args.old = check_angles(in.from);
  args.angles = check_angles(in.to);
  check_sizes_like(op, in.to.inv_freq_name, in.to.inv_freq, in.from.inv_freq_name,
                   in.from.inv_freq);
  check_positions(in.from, in.slot_mapping, args.old.positions);
  check_positions(in.to, in.slot_mapping, args.angles.positions);
  args.rotary_dim = check_rotary_dim(op, std::nullopt, args.angles.pairs, "the length of inv_freq",
                                     args.head_dim, false);
  args.rotary_offset =
      check_rotary_offset(op, in.rotation.rotary_offset, args.rotary_dim, args.head_dim);
  set_flags(args, in.rotation);
  args.q.heads = cache.size(2);
  return args;
}

void shift_cached_k_(const CacheTensor& k_cache, const Tensor& slot_mapping,
                     const Tensor& old_position_ids, const Tensor& new_position_ids,
                     const Tensor& inv_freq, const OptionalTensor& new_inv_freq,
                     double attention_scaling, const RotationOfCache& rotation) {
  const char* const op = "shift_cached_k_";
  const AngleInputs from{op, inv_freq, old_position_ids, std::nullopt,
                         0,  1,        "inv_freq",       "old_position_ids"};
  const AngleInputs to{op,
                       new_inv_freq ? *new_inv_freq : inv_freq,
                       new_position_ids,
                       std::nullopt,
                       0,
                       attention_scaling,
                       new_inv_freq ? "new_inv_freq" : "inv_freq",
                       "new_position_ids"};
  const Inputs in{op, k_cache, slot_mapping, from, to, rotation};
  ShiftArgs args = check(in);
  args.same_frequencies = !new_inv_freq;
  const Named written[] = {{"k_cache", in.k_cache}};
  const Named read[] = {{"slot_mapping", in.slot_mapping},
                        {"old_position_ids", from.position_ids},
                        {"new_position_ids", to.position_ids},
                        {"inv_freq", from.inv_freq},
                        {"new_inv_freq", to.inv_freq}};
  check_written(op, written, read);

  void* data = k_cache.mutable_data_ptr();
  if (data != nullptr) {
    data = static_cast<char*>(data) + args.rotary_offset * k_cache.element_size();
  }
  args.q.out = {data, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2)};
  args.q.in = {data, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2)};
  AngleTensors old, current;
  old.set(args.old, from);
  current.set(args.angles, to);
  run(in.k_cache, args);
}

}  // namespace

std::vector<Operator> cached_keys_operators() {
  return {boxed<&shift_cached_k_>("shift_cached_k_")};
}

}  // namespace rope
