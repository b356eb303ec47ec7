"""The kernels of the CPU: csrc/cpu and what is compiled for each instruction set."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # The last tokens of a sequence are not rotated where heads are outermost.
    *mutants(
        "csrc/cpu/rotation.cpp", "test_apply_rotary test_strides",
        ("last-block-of-tokens-lost", "(args.seq + blocks.tokens - 1) / blocks.tokens",
         "args.seq / blocks.tokens"),
    ),
    # The tail turns by other rows, other channels are written, results go elsewhere.
    *mutants(
        "csrc/cpu/isa/rotation.inl", "test_apply_rotary test_strides attack/test_memory",
        ("tail-by-the-rows-before", "rotate(turn_at<P, kFullWidth>(row, i), tail1, tail2);",
         "rotate(turn_at<P, kFullWidth>(row, last), tail1, tail2);"),
        ("tail-stored-too-early", "P::store(out + P::kStepOut * last, half, tail1, tail2);",
         "P::store(out + P::kStepOut * (i - P::kLanes), half, tail1, tail2);"),
        ("channels-after-counted-without-the-offset",
         "const int64_t after = args.head_dim - before - past;",
         "const int64_t after = args.head_dim - past;"),
        ("result-by-the-batch-stride-of-x",
         "static_cast<T*>(x->out.data) + block.b * x->out.stride_b",
         "static_cast<T*>(x->out.data) + block.b * x->in.stride_b"),
        ("tokens-of-a-block-share-half-a-row", "along_heads ? 0 : rows.stride();",
         "along_heads ? 0 : rows.length;"),
        ("second-halves-of-few-pairs-lost",
         "fill_few<kLanes>(buffer + kLanes, in + half, pairs);",
         "fill_few<kLanes>(buffer + kLanes, in + half, pairs - 1);"),
        ("heads-together-by-the-stride-of-the-result", "P::load(in + h * step_in + P::kStepIn * i,",
         "P::load(in + h * step_out + P::kStepIn * i,"),
    ),
    # Entries of other pairs; the inverse of unequal halves; a NaN that may become a number.
    *mutants(
        "csrc/cpu/isa/table_rows.inl",
        "test_apply_rotary test_special_values test_rotary_at attack/test_memory",
        ("row-of-the-tail-from-whole-vectors-on", "first + pairs - kLanes, kLanes,",
         "first + whole, kLanes,"),
        ("inverse-by-the-first-sine", "kFullWidth ? to.s2[i] : to.s1[i];", "to.s1[i];"),
        ("neighbours-from-the-first-pair-on", "2 * (first + at), 2 * n", "2 * at, 2 * n"),
        ("computed-row-of-the-tail-one-vector-early", "part + pairs - kLanes, kLanes",
         "part + whole - kLanes, kLanes"),
        ("nan-of-the-table-keeps-its-bits",
         "return bit_cast<V>(where_nan(v, U32{} + 0x7fc00000u, bit_cast<U32>(v)));", "return v;"),
        ("computed-rows-are-never-inverted", "apply_flags(args, angles.pairs, to);", ""),
    ),
    # bfloat16: ties away from zero; pairs: cut off instead of rounded, ties to the lower one.
    *mutants(
        "csrc/cpu/isa/bfloat16.inl", "test_special_values test_apply_rotary test_cos_sin",
        ("ties-of-bfloat16-away", "return u + 0x7fffu + ((u >> 16) & 1u);", "return u + 0x8000u;"),
        ("upper-bfloat16-cut-off", "| (nearest_bfloat16(high) & 0xffff0000u)",
         "| (bit_cast<U32>(high) & 0xffff0000u)"),
        ("ties-of-packed-bfloat16-down", "above_half > -odd", "above_half > (odd ^ odd)"),
    ),
    # float64 is rounded twice; one element is lost.
    *mutants(
        "csrc/cpu/isa/storage.inl", "test_special_values test_cos_sin test_apply_rotary",
        ("float64-rounded-twice", "return bit_cast<float>(bits | 1u);", "return f;"),
        ("last-of-a-row-not-converted", "memcpy(padded, from + i, (n - i) * sizeof(S));",
         "memcpy(padded, from + i, (n - i - 1) * sizeof(S));"),
    ),
    # Ties, the largest value and NaN, where no instruction converts them.
    *mutants(
        "csrc/cpu/isa/float16.inl", "test_special_values",
        ("ties-of-portable-float16-away", "+ 0xfffu + ((magnitude >> 13) & 1u)", "+ 0x1000u"),
        ("portable-float16-overflows-late", "(143 << 23)", "(144 << 23)"),
        ("portable-float16-loses-nan", "where_nan(v, U32{} + 0x7e00u, result)",
         "where_nan(v, U32{} + 0x7c00u, result)"),
    ),
    # A slot of -1 is written before the cache; heads go to other places, by other scales.
    *mutants(
        "csrc/cpu/isa/kv_cache.inl",
        "test_append_kv test_append_mla test_append_float8_q test_appends attack/test_memory",
        ("slot-of-minus-1-is-stored",
         "if (!is_inside(slot, args.blocks * args.block_size)) return;",
         "if (slot >= args.blocks * args.block_size) return;"),
        ("q-after-the-first-chunk-of-heads-from-the-first-one",
         "part.q.in = {from + head * q.in.stride_h, 0, 0, q.in.stride_h};",
         "part.q.in = {from, 0, 0, q.in.stride_h};"),
        ("own-scales-of-all-heads-in-one-place", "q.own_scale.data[at(q.own_scale)] = scale;",
         "q.own_scale.data[0] = scale;"),
        ("heads-of-the-cache-by-the-stride-of-k", "const int64_t at = to + head * x.stride_h;",
         "const int64_t at = to + head * x.in.stride_h;"),
        ("one-scale-for-all-heads", "x.scale[head * x.scale_stride_h]", "x.scale[0]"),
        ("reordered-heads-over-the-first-ones",
         "static_cast<T*>(x->out.data) + head * x->out.stride_h;", "static_cast<T*>(x->out.data);"),
        ("tokens-without-a-slot-are-not-rotated", "} else if (heads > 0) {",
         "} else if (heads > 0 && token < args.slot_count) {"),
    ),
    # v is rotated too; the heads of q on their way to float8 keep no place.
    *mutants(
        "csrc/cpu/isa/rms_norm_append.inl", "test_append_normed test_append_float8_q",
        ("v-rotates", "of_v.rotary_dim = 0;", ""),
        ("q-to-float8-beside-its-scratch-memory", "q.out = head + rotary.rotary_offset;",
         "q.out = head;"),
    ),
    # v of another token or group, or rotated channels that are left out.
    *mutants(
        "csrc/cpu/isa/qkv.inl", "test_qkv",
        ("moved-heads-all-of-the-first-group", "g * heads.stride_g + h", "h"),
        ("moved-heads-lose-channels", "static_cast<size_t>(args.head_dim) * sizeof(T)",
         "static_cast<size_t>(args.rotary_dim) * sizeof(T)"),
        ("all-groups-are-the-first", "from.in.data) + g * from.in.stride_g;", "from.in.data);"),
    ),
    # Scales lie elsewhere; pairs after the first piece go to other channels; a part of a group.
    *mutants(
        "csrc/cpu/isa/quantize.inl", "test_quantize attack/test_memory",
        ("scales-of-a-head-are-neighbours", "scale += args_.scales_stride_group;", "scale += 1;"),
        ("pieces-of-halves-as-of-neighbours", "(args_.interleaved_out ? 2 : 1) * piece.first;",
         "2 * piece.first;"),
        ("channels-before-the-rotation-are-lost", "rotating + piece.channel[0]);",
         "rotating + std::max<int64_t>(piece.channel[0], 0));"),
    ),
    # A norm over other channels or with another weight, row or eps.
    *mutants(
        "csrc/cpu/isa/norm_heads.inl", "test_rms_norm_rotary",
        ("weight-of-the-first-head-for-all", "weight != weight_ || at != weight_at_ ||",
         "weight != weight_ ||"),
        ("row-of-the-first-sequence-for-one-token-each", "b != b_ || s != s_ ||", "s != s_ ||"),
        ("mean-from-the-offset-on", "x + h * stride_h - rotary_.rotary_offset;",
         "x + h * stride_h;"),
        ("eps-beside-the-root",
         "std::sqrt(sum_of_squares / channels_of(heads) + static_cast<A>(norm_.eps));",
         "(std::sqrt(sum_of_squares / channels_of(heads)) + static_cast<A>(norm_.eps));"),
        ("channels-after-lost-with-an-offset",
         "after_(args.head_dim - args.rotary_offset - args.rotary_dim)",
         "after_(args.rotary_offset > 0 ? 0 : args.head_dim - args.rotary_dim)"),
    ),
    # Gradients of a head that rotates in part, of k's weight, of the last tokens.
    *mutants(
        "csrc/cpu/isa/rms_norm_grad.inl", "test_rms_norm_rotary test_rms_norm_rotary_transforms",
        ("gradient-of-another-piece-is-kept", "group.heads == 1 && pieces.count() == 1;",
         "group.heads == 1;"),
        ("weight-gradients-of-q-and-k-swapped", "sums + (which == 0 ? 0 : args.q_columns)",
         "sums + (which == 1 ? 0 : args.q_columns)"),
        ("last-chunk-past-the-tokens", "std::min(first + args.chunk_tokens, tokens);",
         "first + args.chunk_tokens;"),
        ("pieces-in-the-order-of-the-gradient", "Pieces pieces(args, args.interleaved_out);",
         "Pieces pieces(args, args.interleaved);"),
    ),
    # A term of the gradient to the table is lost.
    *mutants(
        "csrc/cpu/isa/table_grad.inl", "test_gradients",
        ("sine-gets-half-of-its-gradient", "turn.s1 + turn.s2", "turn.s1"),
        ("tail-of-second-halves-from-the-first-pair",
         "memcpy(x_tail + kLanes, x + second_x + i, rest * sizeof(T));",
         "memcpy(x_tail + kLanes, x + second_x, rest * sizeof(T));"),
    ),
    # Factors of the angle are lost.
    *mutants(
        "csrc/cpu/isa/token_angles.inl", "test_cos_sin test_axes test_gradients",
        ("gradient-with-axes-without-scaling", "kSlope ? position[i] * scaling : scaling",
         "kSlope ? position[i] : scaling"),
        ("cosine-without-scaling", "value.cos * of_pair(scale, i);", "value.cos;"),
        ("start-is-lost", "static_cast<double>(positions.start + at)", "static_cast<double>(at)"),
    ),
    # A wrong sign; tokens after the first chunk are lost.
    *mutants(
        "csrc/cpu/isa/angles.inl", "test_gradients test_axes",
        ("gradient-to-inv-freq-adds-cosines",
         "angles.cos[i] * grad_sin[i] - angles.sin[i] * grad_cos[i]",
         "angles.cos[i] * grad_sin[i] + angles.sin[i] * grad_cos[i]"),
        ("gradient-to-inv-freq-of-the-first-chunk", "chunk < args.chunks; ++chunk",
         "chunk < std::min<int64_t>(args.chunks, 1); ++chunk"),
    ),
]
