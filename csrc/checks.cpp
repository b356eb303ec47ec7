#include "checks.h"

#include <algorithm>

#include "check/heads.h"

namespace rope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Table check_table(const char* op, const TensorView& cos, const TensorView& sin, const TensorView& x,
                  const char* x_name, const Sizes& sizes, bool has_positions,
                  const RotaryOptions& options, int64_t& rotary_dim, int64_t& rotary_offset) {
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
  rotary_dim =
      check_rotary_dim(op, options.rotary_dim, width, "the width of cos", sizes.head_dim, true);
  rotary_offset = check_rotary_offset(op, options.rotary_offset, rotary_dim, sizes.head_dim);
  const int64_t half = rotary_dim / 2;
  const bool full_width = width == rotary_dim;
  const bool is_table = rank == 2;
  const bool is_rows = rank == 3 && !has_positions &&
                       (cos.size(0) == 1 || cos.size(0) == sizes.batch) && cos.size(1) == sizes.seq;
  if ((width != half && !full_width) || (!is_table && !is_rows)) {
    const std::string w = options.rotary_dim ? text(half, "|", rotary_dim) : text(half);
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

  Table table{};
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
  // The order of the result; of x, if inverse: then x has the order that a result had.
  table.interleaved = options.inverse ? options.interleaved : interleaved_out(options);
  return table;
}

// Every position in [0, rows), for position_ids in host memory.
void check_positions(const char* op, const PositionIds& ids, int64_t batch, int64_t seq,
                     int64_t rows, bool one_dim) {
  if (seq == 0) return;  // also where there are 2^40 sequences of no tokens
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

GradHeads grad_heads(const TensorView& grad, const TensorView& x, DType dtype,
                     int64_t rotary_offset) {
  return {heads_of(grad, dtype, rotary_offset), heads_of(x, dtype, rotary_offset),
          x.size(x.dim() - 2)};
}

}  // namespace

RotaryArgs check_apply_rotary(const RotaryInputs& in) {
  const char* const q_name = in.q_name();
  RotaryArgs args{};
  args.op = in.op;
  args.dtype = check_rotated(in.op, q_name, in.q);
  if (in.k) check_k(in.op, in.q, *in.k);

  const Sizes sizes = sizes_of(in.q);
  args.batch = sizes.batch;
  args.seq = sizes.seq;
  args.head_dim = sizes.head_dim;
  args.interleaved = in.options.interleaved;
  args.interleaved_out = interleaved_out(in.options);
  args.inverse = in.options.inverse;
  args.table = check_table(in.op, in.cos, in.sin, in.q, q_name, sizes, in.position_ids.has_value(),
                           in.options, args.rotary_dim, args.rotary_offset);
  if (in.position_ids) {
    args.position_ids =
        check_position_ids(in.op, *in.position_ids, in.q, q_name, sizes, args.table.rows);
  }
  args.q = rotated_heads(in.q, args.dtype, args.rotary_offset);
  if (in.k) args.k = rotated_heads(*in.k, args.dtype, args.rotary_offset);
  return args;
}

void set_output(const RotaryArgs& args, RotatedHeads& heads, const Tensor& out) {
  heads.out = heads_of(out.strides(), out.mutable_data_ptr(), args.dtype, args.rotary_offset);
}

void set_in_place(const RotaryArgs& args, RotatedHeads& heads, const Tensor& x) {
  set_output(args, heads, x);
  heads.in.data = heads.out.data;  // a copy-on-write tensor has moved
}

RotaryTableGradArgs check_table_grad(const TableGradInputs& in) {
  RotaryTableGradArgs args{};
  args.op = in.op;
  args.dtype = check_rotated(in.op, "q", in.q);
  const auto check_grad = [&](const char* name, const TensorView& grad, const char* x_name,
                              const TensorView& x) {
    check_sizes_like(in.op, name, grad, x_name, x);
    check_dtype_like(in.op, name, grad, x_name, x);
    check_device(in.op, name, grad, x_name, x);
    check_last_stride(in.op, name, grad);
  };
  check_grad("grad_q", in.grad_q, "q", in.q);
  if (in.k.has_value() != in.grad_k.has_value()) {
    refuse(in.op, "k and grad_k together", in.k ? "k alone" : "grad_k alone");
  }
  if (in.k) {
    check_k(in.op, in.q, *in.k);
    check_grad("grad_k", *in.grad_k, "k", *in.k);
  }

  const Sizes sizes = sizes_of(in.q);
  args.batch = sizes.batch;
  args.seq = sizes.seq;
  args.interleaved = in.options.interleaved;
  args.interleaved_out = interleaved_out(in.options);
  args.inverse = in.options.inverse;
  int64_t rotary_offset;
  const Table table =
      check_table(in.op, in.cos, in.cos, in.q, "q", sizes, in.token_order.has_value(), in.options,
                  args.rotary_dim, rotary_offset);
  args.table_dtype = table.dtype;
  args.full_width = table.full_width;
  args.table_interleaved = table.interleaved;
  args.rows = table.rows;
  args.grad_batch = in.cos.dim() == 3 ? in.cos.size(0) : 1;

  if (in.token_order.has_value() != in.row_offsets.has_value()) {
    refuse(in.op, "token_order and row_offsets together", "one of them");
  }
  const auto check_index = [&](const char* name, const TensorView& t, int64_t length) {
    if (t.scalar_type() != ScalarType::Long || t.dim() != 1 || t.size(0) != length ||
        !t.is_contiguous()) {
      refuse(in.op, text(name, " to be contiguous int64 of shape [", length, "]"),
             text(dtype_text(t.scalar_type()), " ", shape_text(t)));
    }
    check_device(in.op, name, t, "q", in.q);
    return static_cast<const int64_t*>(t.const_data_ptr());
  };
  if (in.token_order) {
    const int64_t tokens = args.batch * args.seq;
    args.token_order = check_index("token_order", *in.token_order, tokens);
    args.row_offsets = check_index("row_offsets", *in.row_offsets, args.rows + 1);
    if (in.q.is_cpu()) {
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t token = read_once(args.token_order + i);
        if (!is_inside(token, tokens)) {
          refuse(in.op, text("token_order in [0, ", tokens, ")"), text(token));
        }
      }
      int64_t last = 0;
      for (int64_t i = 0; i <= args.rows; ++i) {
        const int64_t offset = read_once(args.row_offsets + i);
        if (offset < last || offset > tokens) {
          refuse(in.op, text("row_offsets to rise from 0 to at most ", tokens), text(offset));
        }
        last = offset;
      }
    }
  }
  args.q = grad_heads(in.grad_q, in.q, args.dtype, rotary_offset);
  if (in.k) args.k = grad_heads(*in.grad_k, *in.k, args.dtype, rotary_offset);
  return args;
}

}  // namespace rope
