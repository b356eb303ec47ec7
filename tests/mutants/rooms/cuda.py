"""The kernels of CUDA and their parts, and checks that only a device shows."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # Tensors of two devices pass; ROPE_EXT_CHECK=1 is without effect.
    *mutants(
        "csrc/check/parts.h", "test_bad_input",
        ("device-unchecked", "if (!t.on_device_of(other)) {", "if (false) {"),
        ("values-on-a-device-unchecked", "value[0] == '1'", "value[0] == '2'"),
    ),
    # Vectors at addresses that are no multiple of their size; k by the heads of q; the wrong order.
    *mutants(
        "csrc/cuda/rotation.cu", "test_apply_rotary test_strides test_cuda_equals_cpu",
        ("copied-channels-may-be-misaligned",
         "alignment.add_channels(args, copied_channels(args) > 0);",
         "alignment.add_channels(args, false);"),
        ("k-by-the-index-of-q", "with_one_head_index(args), plan", "args, plan"),
        ("narrow-vectors-keep-the-order", "!converts && fits(alignment, args, kNarrow)",
         "fits(alignment, args, kNarrow)"),
    ),
    # A factor is lost; groups of threads overwrite the angles of each other.
    *mutants(
        "csrc/math/angle.h", "test_rotary_at",
        ("cosine-by-angles-without-scaling", "value.cos * scale}", "value.cos}"),
    ),
    *mutants(
        "csrc/cuda/parts/rotate_by_angles.cuh", "test_rotary_at test_shift_cached_k",
        ("groups-share-their-angles", "(group * g.fragment_lanes + fragment_lane) * kPairs",
         "fragment_lane * kPairs"),
    ),
    # Half of the sum, channels of the other order, another column.
    *mutants(
        "csrc/cuda/table_grad.cu", "test_gradients test_cuda_equals_cpu",
        ("half-of-the-lanes-not-added", "half > 0; half /= 2", "half > 1; half /= 2"),
        ("gradient-in-the-order-of-x", "F::layout(args.rotary_dim, args.interleaved_out);",
         "F::layout(args.rotary_dim, args.interleaved);"),
        ("second-column-after-the-first", "(args.table_interleaved ? 1 : pairs)", "1"),
    ),
    # Entries past the last token are read or written.
    *mutants(
        "csrc/cuda/angles.cu", "test_cos_sin test_cuda_equals_cpu test_gradients",
        ("last-chunk-past-the-positions", "min(begin + args.chunk_tokens, args.tokens);",
         "begin + args.chunk_tokens;"),
        ("entries-past-the-last-row", "lane < g.rows_per_block && row < rows}",
         "lane < g.rows_per_block}"),
        ("sine-of-the-gradient-added", "grad_sin - value.sin * scale * grad_cos",
         "grad_sin + value.sin * scale * grad_cos"),
    ),
    # What is stored: past the latent, in the order of x, at another place, without a slot.
    *mutants(
        "csrc/cuda/kv_cache.cu", "test_append_kv test_append_mla test_appends",
        ("tail-of-the-latent-by-its-first-vector", "channel + place.in.second < args.v.channels",
         "channel < args.v.channels"),
        ("k-is-stored-in-the-order-of-x", "is_v ? place.in : place.out;", "place.in;"),
        ("tokens-without-a-slot-in-slot-0", "if (is_q || !slot.exists) continue;",
         "if (is_q) continue;"),
    ),
    # Rows of other tensors, scales before the last channels are seen, channels read after written.
    *mutants(
        "csrc/cuda/append_rows.cu", "test_append_normed test_append_float8_q test_appends",
        ("rows-of-v-are-those-of-k", "row -= is_q ? 0 : is_v ? plan.q_rows + plan.k_rows :",
         "row -= is_q ? 0 : is_v ? plan.q_rows :"),
        ("largest-magnitude-of-the-first-vector-alone", "if (i < F::N || both) largest",
         "if (i < F::N) largest"),
        ("scale-of-the-first-head-for-all", "group * plan.scaled_heads + head_of_row;",
         "group * plan.scaled_heads;"),
        ("v-that-has-no-norm-is-not-read", "if (!writes) load_fragment(x, data, in);", ""),
    ),
    # v is rotated, or moved to where a rotated head goes; a group is left out.
    *mutants(
        "csrc/cuda/qkv.cu", "test_qkv",
        ("v-in-the-order-of-the-result", "is_v ? place.in : place.out", "place.out"),
        ("v-is-rotated", "if (rotates && !is_v) x =", "if (rotates) x ="),
        ("groups-never-change", "group += step.groups + (passed ? 1 : 0);",
         "group += step.groups + 1;"),
    ),
    # Magnitudes of other groups.
    *mutants(
        "csrc/cuda/quantize.cu", "test_quantize",
        ("vectors-across-groups", "  alignment.add_elements(args.group_size);\n", ""),
        ("second-vector-in-the-group-of-the-first",
         "const uint32_t second = channel + out.at.second;", "const uint32_t second = channel;"),
        ("groups-of-another-head-of-the-block", "largest + head_of_block * groups;", "largest;"),
    ),
    # Heads and means of other rows.
    *mutants(
        "csrc/cuda/rms_norm.cu", "test_rms_norm_rotary",
        ("heads-of-k-after-those-of-q", "is_q ? part : part - q_heads, 1", "part, 1"),
        ("mean-of-all-heads-by-the-channels-of-one",
         "static_cast<C>(row.heads * rotary.head_dim)", "static_cast<C>(rotary.head_dim)"),
    ),
    # Sums of weight gradients: of other columns, without their last lane, of the last token alone.
    *mutants(
        "csrc/cuda/rms_norm_grad.cu", "test_rms_norm_rotary test_rms_norm_rotary_transforms",
        ("columns-without-the-offset", "(is_q ? 0 : args.q_columns) + rotary.rotary_offset;",
         "(is_q ? 0 : args.q_columns);"),
        ("last-lane-of-columns-lost", "other < kColumnLanes; ++other",
         "other < kColumnLanes - 1; ++other"),
        ("long-rows-keep-their-last-gradient", "sum = first == 0 ? g[i] : sum + g[i];",
         "sum = g[i];"),
    ),
    # Batches of one token each use the slot and the position of the first.
    *mutants(
        "csrc/cuda/parts/sequence_slices.cuh", "test_appends test_apply_rotary test_rotary_at",
        ("one-token-each-in-one-slot", "args.slots.stride_s = args.slots.stride_b;",
         "args.slots.stride_s = 0;"),
        ("one-token-each-at-one-position",
         "args.position_ids.stride_s = args.position_ids.stride_b;",
         "args.position_ids.stride_s = 0;"),
        ("one-token-each-by-one-row", "args.table.cos_stride_row = args.table.cos_stride_b;",
         "args.table.cos_stride_row = 0;"),
    ),
    # Negative positions are read before the table; columns are not sorted.
    *mutants(
        "csrc/cuda/parts/table_values.cuh", "test_bad_input test_apply_rotary",
        ("row-before-the-table", "if (!is_inside(row, table.rows)) {", "if (row >= table.rows) {"),
        ("columns-of-sine-unsorted", "sort_neighbours(values.s1, values.s2);", ""),
    ),
    # Vectors at addresses that are no multiple of their size; channels after the last whole one.
    *mutants(
        "csrc/cuda/parts/alignment.h", "test_strides test_apply_rotary",
        ("stride-of-two-sequences-unaligned", "if (batch > 1) add_elements(x.stride_b);",
         "if (batch > 2) add_elements(x.stride_b);"),
        ("rows-of-sine-unaligned", "add_elements(table.cos_stride_row | table.sin_stride_row);",
         "add_elements(table.cos_stride_row);"),
        ("odd-channels-are-not-copied", "add_elements(args.head_dim - args.rotary_dim);", ""),
    ),
    # A slot after the cache is written; heads by another scale.
    *mutants(
        "csrc/cuda/parts/cache_store.cuh", "test_append_kv test_append_mla test_appends",
        ("slot-one-past-the-cache", "if (index >= static_cast<uint64_t>(args.blocks) * size)",
         "if (index > static_cast<uint64_t>(args.blocks) * size)"),
        ("offset-of-a-float8-cache-in-elements", "rotary.rotary_offset * cache_bytes",
         "rotary.rotary_offset * element_bytes"),
        ("all-heads-by-the-first-scale", "heads.scale + head * heads.scale_stride_h",
         "heads.scale"),
    ),
    # Neighbouring norm rows are added; channels beside those that rotate are read from elsewhere.
    *mutants(
        "csrc/cuda/parts/norm_row.cuh", "test_rms_norm_rotary",
        ("sum-over-two-norm-rows", "if (step < lanes) value +=", "if (step <= lanes) value +="),
        ("channels-after-not-moved-past", "channel < 0 ? channel :", "channel < 1 ? channel :"),
        ("unit-offset-lost", "w[i] += C(1);", "w[i] += C(0);"),
    ),
    # float64 is rounded twice.
    *mutants(
        "csrc/cuda/parts/vector.cuh", "test_cos_sin test_append_kv",
        ("float64-rounded-twice-on-a-device", "__float_as_uint(toward_zero) | (exact ? 0u : 1u)",
         "__float_as_uint(toward_zero)"),
    ),
    # Threads without a token work; a vector of the next head is moved.
    *mutants(
        "csrc/cuda/parts/rotary_plan.cuh", "test_apply_rotary test_strides",
        ("groups-past-the-last-token", " || group >= g.groups)", ")"),
        ("second-copied-vector-past-the-last", "second >= plan.copied_vectors",
         "second > plan.copied_vectors"),
    ),
    # A launch that failed is no error.
    *mutants(
        "csrc/cuda/parts/launch.cuh", "test_cuda_streams",
        ("failed-launch-unseen", "check(cudaGetLastError(), op);", "cudaGetLastError();"),
    ),
]
