"""The typed functions, where results go, decompositions, and the module RotaryEmbedding."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # A wrong argument is ignored, or another one than was given is used.
    *mutants(
        "rope_ext/options.py", "test_bad_input test_out test_apply_rotary",
        ("negative-offset-is-ignored", "if rotary_offset != 0:", "if rotary_offset > 0:"),
        ("sequence-first-is-batch-first", '"sbhd": (4, (0, 1)),', '"sbhd": (4, None),'),
        ("pairs-to-halves-in-place-passes", "if order is not None and order != interleaved:",
         "if order and order != interleaved:"),
    ),
    # In a transform nothing is written; `out` counts no version.
    *mutants(
        "rope_ext/_destinations.py", "test_direct_calls test_out test_in_place test_transforms",
        ("transforms-write-nothing",
         "tuple(x.copy_(y) for x, y in zip(tensors, new, strict=True))", "tuple(new)"),
        ("out-counts-no-version", "options, tuple(out))", "options)"),
        ("out-in-the-order-of-bshd", 'as_bshd(out[0], layout, function, "out")', "out[0]"),
    ),
    # Autograd is not told, or does not raise before data are written.
    *mutants(
        "rope_ext/_in_place.py", "test_in_place test_rms_norm_rotary_transforms",
        ("not-marked-as-dirty", "ctx.mark_dirty(x)", "pass"),
        ("what-can-not-be-undone-may-need-a-gradient",
         "x is not None and x.requires_grad and torch.is_grad_enabled()", "False"),
        ("sin-may-need-a-gradient", "if cos.requires_grad or sin.requires_grad:",
         "if cos.requires_grad:"),
        ("view-of-a-leaf-is-written", "for leaf in (x, base_of(x))", "for leaf in (x,)"),
    ),
    # The error advises another layout, or does not name the argument.
    *mutants(
        "rope_ext/_argument_errors.py", "test_wrong_arguments",
        ("heads-and-sequence-mixed-up", '(1, 2) if layout == "bshd" else (2, 1)',
         '(2, 1) if layout == "bshd" else (1, 2)'),
        ("integers-of-65-bits-pass", "-(2**63) <= number < 2**63", "-(2**64) <= number < 2**64"),
    ),
    # Autograd does not see a write; scales and the order of k_pe are lost.
    *mutants(
        "rope_ext/kv_cache.py", "test_direct_calls test_appends test_append_kv",
        ("v-cache-counts-no-version", "written = (q, k, k_cache, v_cache, *outs.values())",
         "written = (q, k, k_cache, *outs.values())"),
        ("latent-cache-counts-no-version", "(q, k_pe, kv_cache, *outs.values())",
         "(q, k_pe, *outs.values())"),
        ("scales-are-lost", "if t is not None}", "if t is None}"),
        ("order-in-the-latent-cache-is-lost", ", interleaved_out=interleaved_out)", ")"),
    ),
    # A table that begins later has the angles from 0 on.
    *mutants(
        "rope_ext/angles.py", "test_direct_calls test_cos_sin",
        ("later-tables-begin-at-0", '{"start": start,', '{"start": 0,'),
    ),
    # Heads are taken for tokens of a block.
    *mutants(
        "rope_ext/options.py", "test_append_kv test_direct_calls",
        ("heads-first-caches-as-they-are", '"HND": (4, (1, 2))', '"HND": (4, None)'),
    ),
    # Values below the default are ignored.
    *mutants(
        "rope_ext/options.py", "test_direct_calls test_rms_norm_rotary",
        ("smaller-eps-is-ignored", "if eps != 1e-6:", "if eps > 1e-6:"),
    ),
    # sin may need a gradient in place.
    *mutants(
        "rope_ext/rms_norm.py", "test_rms_norm_rotary_transforms test_in_place",
        ("gradient-to-sin-is-lost-in-place", '(*names, "cos", "sin")', '(*names, "cos")'),
    ),
    # The same.
    *mutants(
        "rope_ext/rotation_by_angles.py", "test_direct_calls test_rotary_at",
        ("scaling-below-1-is-ignored", "if attention_scaling != 1.0:",
         "if attention_scaling > 1.0:"),
    ),
    # In a graph: a row for a position before the table, 16-bit arithmetic, a choice that is lost.
    *mutants(
        "rope_ext/decompositions.py", "test_compile test_export",
        ("decomposed-position-before-the-table", "((ids >= 0) & (ids < cos.shape[0]))",
         "(ids < cos.shape[0])"),
        ("decomposed-arithmetic-of-x",
         "torch.float64 if of.dtype == torch.float64 else torch.float32", "of.dtype"),
    ),
    # On devices without kernels a token without a slot writes one; angles are not exact.
    *mutants(
        "rope_ext/decompositions.py", "test_fallback",
        ("plain-slots-past-the-end", "(slots >= 0) & (slots < cache.shape[0] * size)",
         "slots >= 0"),
        ("plain-tokens-without-slot-write-their-own", "inside.int().argmax()", "token"),
        ("plain-cache-without-slots-is-written", "torch.where(inside.any(), rows, cache[at])",
         "rows"),
        ("plain-table-gradient-of-k-alone", "[total + each.sum(-2)", "[each.sum(-2)"),
    ),
    *mutants(
        "rope_ext/_exact_angles.py", "test_fallback",
        ("plain-product-is-rounded", "rest, lost = _sum(angle_tail, -turned_tail)",
         "rest, lost = _sum(0 * angle_tail, -turned_tail)"),
    ),
    # What holds after a block is not what held before it.
    *mutants(
        "rope_ext/lowering.py", "test_compile",
        ("block-in-a-block-ends-both", "_decomposes = self.before", "_decomposes = False"),
    ),
    # Tables of frequencies that have been written since, or of other positions.
    *mutants(
        "rope_ext/module/tables.py", "test_embedding test_threads",
        ("table-outlives-its-frequencies", " or made.version != version)", ")"),
        ("rows-that-are-missing-begin-at-0", "start=there,", "start=0,"),
        ("table-of-an-inference-tensor-is-kept", "if inv_freq.is_inference() or", "if"),
    ),
    # Direct calls take a table that the module would make anew, or heads of any size.
    *mutants(
        "rope_ext/module/tables.py", "test_direct_calls",
        ("kept-table-outlives-its-frequencies", "or of._version != version", "or False"),
        ("kept-table-has-no-gradient", "or of.requires_grad", "or False"),
    ),
    *mutants(
        "rope_ext/module/rotary_embedding.py", "test_direct_calls",
        ("module-takes-any-head-dim", 'own["head_dim"], q, k, cos,', "None, q, k, cos,"),
        ("short-table-for-long-sequences", 'name = "short_inv_freq"', 'name = "inv_freq"'),
        ("rows-of-float64", "or q.dtype is torch.float64", "or False"),
    ),
    # Frequencies are cast, saved, or forgotten.
    *mutants(
        "rope_ext/module/frequency_tensors.py", "test_embedding",
        ("frequencies-follow-a-cast",
         "return result if tensor.is_meta else tensor.to(result.device)", "return result"),
        ("frequencies-in-the-state-dict", "persistent=False", "persistent=True"),
        ("frequencies-after-to-empty-are-any", "if was_meta and not self.inv_freq.is_meta:",
         "if was_meta and self.inv_freq.is_meta:"),
    ),
    # The regime of a sequence that is exactly as long, or one token longer, or shorter than before.
    *mutants(
        "rope_ext/module/frequencies_by_length.py", "test_embedding_scaling",
        ("original-length-is-long", "length > self.original_max_position_embeddings",
         "length >= self.original_max_position_embeddings"),
        ("length-is-the-last-position", "return positions.max().long() + 1",
         "return positions.max().long()"),
        ("longest-so-far-is-forgotten",
         "torch.where(length < original, original, torch.maximum(seen, length))",
         "torch.where(length < original, original, length)"),
    ),
    # Another order of pairs, another scaling, a gradient or a length that is lost.
    *mutants(
        "rope_ext/module/rotary_embedding.py", "test_embedding test_embedding_scaling",
        ("module-never-interleaves", "interleaved=self.interleaved,", "interleaved=False,"),
        ("long-regime-by-the-short-scaling", '"long_inv_freq", self.long_attention_scaling',
         '"long_inv_freq", self.attention_scaling'),
        ("longest-length-is-not-remembered", "            length = seen = stretched",
         "            length = stretched"),
        ("learned-frequencies-get-no-gradient",
         "torch.compiler.is_compiling() or self.learned or inv_freq.requires_grad",
         "torch.compiler.is_compiling()"),
    ),
]
