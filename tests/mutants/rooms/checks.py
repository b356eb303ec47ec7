"""csrc/check and the families: what is refused, and what a kernel is told."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # A last dimension of stride 0 passes, any dtype is read as positions, packed heads and channels
    # are read from elsewhere.
    *mutants(
        "csrc/check/parts.h", "test_bad_input test_apply_rotary attack/test_arguments",
        ("expanded-last-dimension-passes", "t.stride(last) != 1", "t.stride(last) > 1"),
        ("index-of-any-dtype-passes",
         "if (t.scalar_type() != torch::headeronly::ScalarType::Int &&",
         "if (false && t.scalar_type() != torch::headeronly::ScalarType::Int &&"),
        ("packed-tokens-by-the-stride-of-heads",
         "return {data, 0, strides[0], strides[1]};", "return {data, 0, strides[1], strides[1]};"),
        ("first-channel-in-bytes", "+ first * size_of(dtype)", "+ first"),
    ),
    # Arguments are accepted that make the kernel read or write other memory than the tensors have.
    *mutants(
        "csrc/check/heads.h", "test_bad_input attack/test_arguments",
        ("head-dim-of-k-unchecked", "same = d == q.dim() - 2 ||", "same = d == q.dim() - 1 ||"),
        ("dtype-of-k-unchecked", 'check_dtype_like(op, "k", k, "q", q);', ""),
        ("odd-rotary-dim-passes", "rotary_dim % 2 != 0 || rotary_dim > head_dim",
         "rotary_dim > head_dim"),
        ("rotary-offset-past-the-end-passes", "given > most", "given > most + 1"),
    ),
    # Views that share elements are written.
    *mutants(
        "csrc/check/overlap.cpp", "test_bad_input test_overlap",
        ("sliding-windows-pass", "if (a.stride[d] < extent) return true;",
         "if (a.stride[d] == 0) return true;"),
        ("overlap-within-a-run-unseen",
         "search.reaches(0, distance - (a.bytes - 1), distance + (b.bytes - 1))",
         "search.reaches(0, distance, distance + (b.bytes - 1))"),
    ),
    # q and k that share elements are written.
    *mutants(
        "csrc/check/written.h", "test_bad_input test_overlap",
        ("overlap-of-two-written-unseen", "size_t b = a + 1", "size_t b = a + 2"),
    ),
    # Rows of the table are taken from another place, or from outside of it.
    *mutants(
        "csrc/check/rotation.cpp",
        "test_bad_input test_apply_rotary test_strides attack/test_arguments",
        ("positions-of-two-sequences-are-those-of-one", "rank == 2 && ids.size(0) > 1)",
         "rank == 2 && ids.size(0) > 2)"),
        ("positions-of-the-last-sequence-unchecked", "std::min<int64_t>(batch, 1) : batch;",
         "std::min<int64_t>(batch, 1) : batch - 1;"),
        ("columns-of-an-inverse-in-the-order-of-the-result",
         "rotation.inverse ? rotation.interleaved : rotation.result_interleaved();",
         "rotation.result_interleaved();"),
        ("table-one-row-short-passes", "cos.size(0) < sizes.seq)", "cos.size(0) + 1 < sizes.seq)"),
        ("rows-of-sin-by-the-stride-of-cos", "table.sin_stride_row = sin.stride(rank - 2);",
         "table.sin_stride_row = cos.stride(rank - 2);"),
        ("shared-rows-have-a-batch-stride", "if (is_rows && cos.size(0) > 1) {", "if (is_rows) {"),
        ("order-may-change-in-place", "if (rotation.result_interleaved() == interleaved) return;",
         "if (rotation.result_interleaved() || !interleaved) return;"),
    ),
    # A wrong axis is no error, but NaN.
    *mutants(
        "csrc/check/angles.cpp", "test_axes attack/test_arguments",
        ("axis-one-past-the-last-passes", "if (is_inside(axis, count)) continue;",
         "if (is_inside(axis, count + 1)) continue;"),
    ),
    # Slots and scales that store wrong values are accepted; scales are read from elsewhere.
    *mutants(
        "csrc/check/cache.cpp",
        "test_appends test_append_kv test_append_mla test_append_float8_q",
        ("one-slot-too-many-passes", "slots.size(0) <= batch * seq",
         "slots.size(0) <= batch * seq + 1"),
        ("neighbours-of-one-slot-pass", "rising && last < slot;", "rising && last <= slot;"),
        ("q-out-of-the-model's-dtype-passes", "if (dtype == CacheDType::OfModel) {",
         "if (false) {"),
        ("two-kinds-of-scales-pass", "if (scale && scale_out) refuse", "if (false) refuse"),
        ("scale-of-0-passes", "(each) && each > 0", "(each) && each >= 0"),
        ("scales-of-heads-are-dense", "a_head ? scale.stride(0) : 0}", "a_head ? 1 : 0}"),
        ("slot-at-the-end-of-the-cache-passes", "if (slot >= capacity) {",
         "if (slot > capacity) {"),
    ),
    # v is stored with the scale, or by the strides, of k.
    *mutants(
        "csrc/kv_cache.cpp", "test_append_kv test_append_normed test_appends",
        ("v-may-be-k-where-it-is-normalised", '{"v", writes_v ? &in.v : nullptr},',
         '{"v", nullptr},'),
        ("v-by-the-scale-of-k", '"v_scale", in.v_scale,', '"v_scale", in.k_scale,'),
        ("v-cache-by-the-strides-of-k-cache", "stored(in.v, in.v_cache);",
         "stored(in.v, in.k_cache);"),
        ("slots-may-overlap-what-is-written", '{"slot_mapping", in.slot_mapping},',
         '{"slot_mapping", in.v},'),
    ),
    # Rows of the cache are overwritten, or go to other places.
    *mutants(
        "csrc/latent_cache.cpp", "test_append_mla test_appends",
        ("k-pe-over-the-latent", "set_cache(args.k, kv_cache, args.v.channels);",
         "set_cache(args.k, kv_cache, 0);"),
        ("offset-in-a-block-by-the-stride-of-blocks",
         "stride_offset = in.kv_cache.stride(1);", "stride_offset = in.kv_cache.stride(0);"),
    ),
    # The gradient of an inverse rotation is rotated the wrong way.
    *mutants(
        "csrc/check/rotation.h", "test_rms_norm_rotary test_rms_norm_rotary_transforms test_qkv",
        ("gradient-of-an-inverse-is-inverse", "rotary.inverse = !rotary.inverse;",
         "rotary.inverse = true;"),
    ),
    # Heads of q, k and v that don't add up; groups from elsewhere; gradients of other sizes.
    *mutants(
        "csrc/check/packed.cpp", "test_qkv",
        ("any-number-of-heads-of-q-passes", "|| of_q % *kv_heads != 0)", ")"),
        ("group-without-q-passes", "groups < 1 || heads < 3", "groups < 1 || heads < 2"),
        ("part-of-other-heads-passes", "part.size(token_dims) == heads &&", ""),
    ),
    *mutants(
        "csrc/check/packed.h", "test_qkv",
        ("groups-of-a-part-lie-together", "out.stride_g = heads * out.stride_h;",
         "out.stride_g = out.stride_h;"),
    ),
    # The gradient is packed in another order, or a missing one is read.
    *mutants(
        "csrc/qkv.cpp", "test_qkv",
        ("parts-all-at-the-first-head", "before += part->heads;", "before += 0;"),
        ("missing-gradients-are-those-of-the-first", "parts[i]->in = {};", ""),
    ),
    # Weights may be what is written.
    *mutants(
        "csrc/rms_norm.cpp", "test_rms_norm_rotary test_rms_norm_rotary_transforms test_qkv",
        ("weight-may-overlap-what-is-written",
         "{{call.in.q_weight_name, call.in.q_weight},", '{{"cos", in.cos},'),
    ),
    # NaN passes for an eps, and a weight for fewer heads.
    *mutants(
        "csrc/check/norm.cpp", "test_rms_norm_rotary test_rms_norm_rotary_transforms",
        ("eps-of-nan-passes", "if (!(options.eps >= 0))", "if (options.eps < 0)"),
        ("shape-of-the-weight-half-checked", "rank == 2 && weight.size(0) == heads", "rank == 2"),
    ),
    # Scales that are subnormal, or that are written over the result.
    *mutants(
        "csrc/quantize.cpp", "test_quantize",
        ("eps-that-makes-subnormal-scales-passes", "eps >= kLeastEps &&", "eps > 0 &&"),
        ("scales-may-lie-in-the-result", """{{"x_out", x_out}, {"scale_out", scale_out}}""",
         """{{"x_out", x_out}}"""),
        ("more-groups-than-shared-memory-holds", "head_dim / group_size > kMostGroups", "false"),
    ),
    # Sequences of several axes begin elsewhere.
    *mutants(
        "csrc/rotation_by_angles.cpp", "test_rotary_at",
        ("sequences-by-the-stride-of-axes", "positions.stride_b = ids.stride(first);",
         "positions.stride_b = ids.stride(0);"),
    ),
    # Tables of float64 frequencies are rounded to float32.
    *mutants(
        "csrc/angles.cpp", "test_cos_sin",
        ("table-of-float64-is-float32", "ScalarType::Double ? ScalarType::Double :",
         "ScalarType::Double ? ScalarType::Float :"),
    ),
    # Rows of all sequences but the first get no gradient; offsets that fall are no error.
    *mutants(
        "csrc/table_grad.cpp", "test_gradients test_bad_input",
        ("gradient-to-the-first-rows-alone", "in.cos.dim() == 3 ? in.cos.size(0) : 1;", "1;"),
        ("row-offsets-may-fall", "offset < last || offset > tokens", "offset > tokens"),
    ),
]
