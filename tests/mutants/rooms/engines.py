"""What PyTorch has to know of the operators: rope_ext/_engine, and the records of _operators."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # Expanded gradients fail, tangents and outer derivatives are lost.
    *mutants(
        "rope_ext/_engine/autograd.py", "test_gradients test_transforms test_every_operator",
        ("expanded-gradient-reaches-the-operator",
         "return grad if grad.stride(-1) == 1 else grad.contiguous()", "return grad"),
        ("tangent-of-the-table-lost", "else a + b", "else a"),
        ("outer-levels-do-not-differentiate", "with call.modes(), below_autograd():",
         "with below_autograd():"),
        ("both-gradients-are-the-first", "torch.zeros_like(first) if second is None else second",
         "torch.zeros_like(first) if second is None else first"),
    ),
    # Autograd does not see that a tensor was written, or is skipped where it has work to do.
    *mutants(
        "rope_ext/_engine/calls.py", "test_in_place test_out test_appends test_transforms",
        ("functions-count-no-version", "increment_version(counted)", "pass"),
        ("inference-tensors-are-written", "check_may_be_written(operator, written)", "pass"),
        ("gradient-of-cos-is-skipped", "any_requires_grad(*args, *written, *options.values())",
         "any_requires_grad(args[0], *written, *options.values())"),
    ),
    # A device without kernels is not announced, or not once; results stay empty.
    *mutants(
        "rope_ext/_engine/fallback.py", "test_fallback test_bad_input",
        ("fallback-is-said-each-time", "announced.add(device)", "pass"),
        ("fallback-is-not-refused", 'if os.environ.get(ENVIRONMENT_VARIABLE) == "error":',
         "if False:"),
        ("graphs-keep-operators", "return _plain.get(operator, operator)", "return operator"),
        ("plain-results-are-empty", "result.copy_(value)", "pass"),
    ),
    # The same for direct calls of the operators; gradients and tangents are lost.
    *mutants(
        "rope_ext/_engine/writes.py", "test_every_operator test_in_place test_appends",
        ("operators-count-no-version", "increment_version(written)", "pass"),
        ("gradient-of-what-is-read-is-lost", "any_requires_grad(*args, *options.values()):",
         "any_requires_grad(*written):"),
        ("tangent-of-what-is-read-is-lost", "is_dual(*args, *options.values()):",
         "is_dual(*written):"),
    ),
    # Graphs get other strides; a meta tensor among real ones passes.
    *mutants(
        "rope_ext/_engine/fakes.py", "test_every_operator test_strides test_export",
        ("fakes-of-overlapping-heads-keep-their-strides",
         "return out if out.stride(-1) == 1 else _contiguous_like(x)", "return out"),
        ("fakes-take-any-device", "other is not None and other.device != device",
         "other is not None and other.device == 0"),
    ),
    # FLOPs of one channel a pair.
    *mutants(
        "rope_ext/_engine/flops.py", "test_transforms test_every_operator",
        ("half-of-the-channels-counted", "or 2 * given[operator.pairs][-1]",
         "or given[operator.pairs][-1]"),
    ),
    # Samples along another dimension, with rows of another sample, or one tensor for all written.
    *mutants(
        "rope_ext/_engine/vmap.py", "test_transforms test_every_operator",
        ("samples-are-always-first", "if dim is None else x.movedim(dim, 0)",
         "if dim is None else x"),
        ("positions-reach-into-the-next-table", "(ids < 0) | (ids >= length)", "(ids < 0)"),
        ("one-tensor-is-written-for-all-samples",
         "            _check_written_are_batched(operator, dims)", "            pass"),
        ("samples-in-place-are-not-written",
         "given[name].movedim(dims[name], 0).copy_(out)", "pass"),
        ("all-samples-by-the-first-table", "ids = torch.where(outside, -1, ids + first)",
         "ids = torch.where(outside, -1, ids)"),
    ),
    # Ranks rotate by rows and positions of other tokens, or write copies.
    *mutants(
        "rope_ext/_engine/sharding.py", "test_distributed",
        ("rows-for-all-sequences-are-sharded", "(None if cos.shape[0] == 1 else BATCH,",
         "(BATCH,"),
        ("every-rank-begins-at-position-0", "return part_of_range(0, length, SEQUENCE)",
         "return None"),
    ),
    # A tensor is rotated in a copy; the largest of several is rotated as their sum.
    *mutants(
        "rope_ext/_engine/placements.py", "test_distributed",
        ("replicated-tensor-is-written-in-a-copy",
         "(type(given) is not Replicate or operand.written)", "type(given) is not Replicate"),
        ("every-rank-has-the-first-part", "begin + each * mesh.get_local_rank(mesh_dim), end)",
         "begin, end)"),
        ("any-pending-sum-passes", 'given.reduce_op in ("sum", "avg")', "given.reduce_op"),
    ),
    # Results are on a mesh that was equal.
    *mutants(
        "rope_ext/_engine/dtensor.py", "test_distributed",
        ("results-are-on-another-mesh", "if known_mesh is mesh:", "if known_mesh is not None:"),
    ),
    # Negated values are read as they are in memory.
    *mutants(
        "rope_ext/_engine/negative_and_zero_tensors.py", "test_unusual_tensors",
        ("negated-elements-read-raw",
         "return x.clone() if isinstance(x, Tensor) and is_other(x) else x", "return x"),
    ),
    # Gradients of inverse rotations and of other orders, tangents with an offset, a lost gradient.
    *mutants(
        "rope_ext/_operators/rotation.py",
        "test_gradients test_transforms test_every_operator",
        ("backward-is-always-inverse", '"inverse": not options.get("inverse", False)}',
         '"inverse": True}'),
        ("backward-keeps-the-order-of-the-result",
         'inverse["interleaved_out"] = options.get("interleaved", False)',
         'inverse["interleaved_out"] = options["interleaved_out"]'),
        ("tangent-of-the-table-without-the-offset",
         "return pad(out, (offset, x.shape[-1] - offset - dim))",
         "return pad(out, (0, x.shape[-1] - dim))"),
        ("gradient-to-sin-alone-is-lost", "ctx.needs_input_grad[rotated : rotated + 2]",
         "ctx.needs_input_grad[rotated : rotated + 1]"),
        ("tokens-of-a-row-from-the-row-before",
         "torch.searchsorted(offsets[1:].contiguous(), place, right=True)",
         "torch.searchsorted(offsets[1:].contiguous(), place, right=False)"),
        ("rows-past-the-sequence-have-tokens", ".clamp(max=seq)", ""),
    ),
    # Signs and factors of derivatives.
    *mutants(
        "rope_ext/_operators/angles.py", "test_gradients test_axes test_transforms",
        ("tangent-of-cos-has-the-wrong-sign", "return (-(sin * of_angle)).to(dtype),",
         "return (sin * of_angle).to(dtype),"),
        ("second-derivative-has-the-wrong-sign", "position * grad_sin, -position * grad_cos",
         "position * grad_sin, position * grad_cos"),
        ("gradient-to-positions-without-the-frequency",
         "(cos * grad_sin - sin * grad_cos) * inv_freq", "cos * grad_sin - sin * grad_cos"),
        ("gradient-of-a-cache-begins-at-0", 'for name in ("start", "attention_scaling")',
         'for name in ("attention_scaling",)'),
    ),
    # A gradient is packed in another order, q is kept, or heads of a rank are those of all.
    *mutants(
        "rope_ext/_operators/qkv.py", "test_qkv",
        ("gradient-of-a-group-is-flat", 'packing["by_group"] = kv_heads is None',
         'packing["by_group"] = False'),
        ("forward-keeps-qkv", "qkv if ctx.table_needs_grad else None", "qkv"),
        ("heads-of-all-ranks", "given[name] * count // of_first", "given[name]"),
        ("tokens-always-by-sequence", "dims == 2 and min(sizes) > 1 and x.stride(0) < x.stride(1)",
         "False"),
    ),
    # Tangents, FLOPs and shards of a norm over all heads.
    *mutants(
        "rope_ext/_operators/rms_norm.py", "test_rms_norm_rotary_transforms",
        ("tangent-of-the-norm-of-one-head", "along = (self.n * x).mean(self.row, keepdim=True)",
         "along = (self.n * x).mean(-1, keepdim=True)"),
        ("forward-of-the-norm-counts-3", '"flops_channel": 4', '"flops_channel": 3'),
        ("heads-of-one-norm-are-sharded",
         "HEADS_OF if of_each_head else (None, None)", "HEADS_OF"),
    ),
    # A row of the table gets the gradients of the next one.
    *mutants(
        "rope_ext/_operators/token_order.py", "test_gradients",
        ("tokens-of-a-row-from-the-row-after", "torch.searchsorted(in_order, each_row)",
         "torch.searchsorted(in_order, each_row, right=True)"),
    ),
    # The gradient of an inverse rotation has the wrong sign.
    *mutants(
        "rope_ext/_operators/rotation_by_angles.py", "test_rotary_at",
        ("gradient-to-frequencies-never-inverse",
         'if name != "attention_scaling"}',
         'if name not in ("attention_scaling", "inverse")}'),
    ),
]
