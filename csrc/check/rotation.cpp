#include "check/rotation.h"

#include <algorithm>

#include "check/heads.h"

namespace rope {

namespace {

// Every position is in [0, rows); `ids` are in host memory.
void check_positions(const char* op, const PositionIds& ids, int64_t batch, int64_t seq,
                     int64_t rows, bool one_dim) {
  if (seq == 0) return;  // without a loop over the batch, which may be 2^40
  const int64_t distinct_batch = ids.stride_b == 0 ? std::min<int64_t>(batch, 1) : batch;
  for (int64_t b = 0; b < distinct_batch; ++b) {
    for (int64_t s = 0; s < seq; ++s) {
      const int64_t id = entry_of(ids, b, s);
      if (is_inside(id, rows)) continue;
      const std::string index = one_dim ? text("[", s, "]") : text("[", b, ", ", s, "]");
      refuse(op, text("position_ids in [0, ", rows, "), the rows of cos and sin"),
             text(id, " at index ", index));
    }
  }
}

PositionIds position_ids_of(const TensorView& ids, bool packed) {
  PositionIds out{};
  out.data = ids.const_data_ptr();
  out.int64 = ids.scalar_type() == ScalarType::Long;
  const int64_t rank = ids.dim();
  out.stride_s = ids.stride(rank - 1);
  if (!packed && rank == 2 && ids.size(0) > 1) out.stride_b = ids.stride(0);
  return out;
}

PositionIds check_position_ids(const char* op, const TensorView& ids, const TensorView& x,
                               const char* x_name, const Sizes& sizes, int64_t rows) {
  check_int(op, "position_ids", ids);
  check_device(op, "position_ids", ids, x_name, x);
  const int64_t rank = ids.dim();
  const bool fits = (rank == 1 && ids.size(0) == sizes.seq) ||
                    (rank == 2 && !sizes.packed && ids.size(1) == sizes.seq &&
                     (ids.size(0) == 1 || ids.size(0) == sizes.batch));
  if (!fits) {
    refuse(op,
           sizes.packed ? text("position_ids to have shape [T] with T = ", sizes.seq)
                        : text("position_ids to have shape [S] or [1|B, S] with B = ", sizes.batch,
                               ", S = ", sizes.seq),
           shape_text(ids));
  }
  const auto check_values = [&](const TensorView& on_host) {
    check_positions(op, position_ids_of(on_host, sizes.packed), sizes.batch, sizes.seq, rows,
                    rank == 1);
  };
  look_at_values(ids, check_values);
  return position_ids_of(ids, sizes.packed);
}

}  // namespace

CheckedTable check_table(const char* op, const TensorView& cos, const TensorView& sin,
                         const TensorView& x, const char* x_name, bool has_positions,
                         const Rotation& rotation) {
  const Sizes sizes = sizes_of(x);
  const DType dtype = check_floating(op, "cos", cos);
  check_dtype_like(op, "sin", sin, "cos", cos);
  check_sizes_like(op, "sin", sin, "cos", cos);
  check_device(op, "cos", cos, x_name, x);
  check_device(op, "sin", sin, x_name, x);

  const int64_t rank = cos.dim();
  if (rank != 2 && rank != 3) {
    refuse(op, text("cos to have shape [L, W] or ", sizes.packed ? "[1, T, W]" : "[1|B, S, W]"),
           shape_text(cos));
  }
  const int64_t width = cos.size(rank - 1);
  const int64_t rotary_dim =
      check_rotary_dim(op, rotation.rotary_dim, width, "the width of cos", sizes.head_dim, true);
  const int64_t rotary_offset =
      check_rotary_offset(op, rotation.rotary_offset, rotary_dim, sizes.head_dim);
  const int64_t half = rotary_dim / 2;
  const bool full_width = width == rotary_dim;
  const bool is_table = rank == 2;
  const bool is_rows = rank == 3 && !has_positions &&
                       (cos.size(0) == 1 || cos.size(0) == sizes.batch) && cos.size(1) == sizes.seq;
  if ((width != half && !full_width) || (!is_table && !is_rows)) {
    const std::string w = rotation.rotary_dim ? text(half, "|", rotary_dim) : text(half);
    const std::string table = text("cos to have shape [L, ", w, "]");
    const std::string rows =
        sizes.packed ? text(" or [1, T, ", w, "] with T = ", sizes.seq)
                     : text(" or [1|B, S, ", w, "] with B = ", sizes.batch, ", S = ", sizes.seq);
    refuse(op, has_positions ? table : table + rows, shape_text(cos));
  }
  check_last_stride(op, "cos", cos);
  check_last_stride(op, "sin", sin);
  if (is_table && !has_positions && cos.size(0) < sizes.seq) {
    refuse(op,
           text("cos to have a row for each of the ", sizes.seq,
                " positions (no position_ids were given)"),
           shape_text(cos));
  }

  CheckedTable out{{}, rotary_dim, rotary_offset};
  Table& table = out.table;
  table.cos = cos.const_data_ptr();
  table.sin = sin.const_data_ptr();
  table.dtype = dtype;
  table.rows = cos.size(rank - 2);
  table.cos_stride_row = cos.stride(rank - 2);
  table.sin_stride_row = sin.stride(rank - 2);
  if (is_rows && cos.size(0) > 1) {
    table.cos_stride_b = cos.stride(0);
    table.sin_stride_b = sin.stride(0);
  }
  table.full_width = full_width;
  // The order of the result; if inverse, that of x, which is the result of a rotation.
  table.interleaved = rotation.inverse ? rotation.interleaved : rotation.result_interleaved();
  return out;
}

RotaryArgs check_apply_rotary(const RotaryInputs& in) {
  RotaryArgs args{};
  args.op = in.op;
  args.dtype = check_rotated(in.op, in.q_name, in.q);
  if (in.k) check_k(in.op, in.q, *in.k);

  const Sizes sizes = sizes_of(in.q);
  args.batch = sizes.batch;
  args.seq = sizes.seq;
  args.head_dim = sizes.head_dim;
  set_flags(args, in.rotation);
  const CheckedTable checked =
      check_table(in.op, in.cos, in.sin, in.q, in.q_name, in.position_ids.has_value(), in.rotation);
  args.table = checked.table;
  args.rotary_dim = checked.rotary_dim;
  args.rotary_offset = checked.rotary_offset;
  if (in.position_ids) {
    args.position_ids =
        check_position_ids(in.op, *in.position_ids, in.q, in.q_name, sizes, args.table.rows);
  }
  args.q = rotated_heads(in.q, args.dtype, args.rotary_offset);
  if (in.k) args.k = rotated_heads(*in.k, args.dtype, args.rotary_offset);
  return args;
}

void check_order_stays(const char* op, const Rotation& rotation) {
  const bool interleaved = rotation.interleaved;
  if (rotation.result_interleaved() == interleaved) return;
  const auto name = [](bool value) { return value ? "True" : "False"; };
  refuse(op,
         text("interleaved_out to be None or interleaved, ", name(interleaved),
              ", as a rotation in place leaves the pairs where they are"),
         name(!interleaved));
}

}  // namespace rope
