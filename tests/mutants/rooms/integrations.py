"""The patch for transformers, the signatures of other libraries, and ONNX."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # Channels, tokens and angles of models that are rotated otherwise.
    *mutants(
        "rope_ext/integrations/patching/pairs.py", "test_rotations test_model_families",
        ("last-channels-are-the-first", "head_dim - rotary_dim if self.last_channels else 0", "0"),
        ("negated-angles-are-not", "return cos, -sin if self.negated else sin", "return cos, sin"),
    ),
    *mutants(
        "rope_ext/integrations/transformers/rotations.py", "test_rotations test_model_families",
        ("tokens-before-the-table-become-0", "(0, 0, before, after), value=1.0)",
         "(0, 0, before, after), value=0.0)"),
    ),
    # A function that computes something else is replaced.
    *mutants(
        "rope_ext/integrations/patching/recognition.py",
        "test_patch_refusals test_rotations test_demo",
        ("any-result-agrees", "TOLERANCE = 8", "TOLERANCE = 8e9"),
        ("stopped-gradients-agree",
         "_same_gradients(self.function, replacement, expected[0], form.differentiated)", "True"),
    ),
    # What is patched too long, too short, or without effect.
    *mutants(
        "rope_ext/integrations/patching/models.py", "test_transformers_patch",
        ("first-block-unpatches-for-all", "        if not reasons:", "        if True:"),
        ("pickled-as-patched", "return (original.__new__, (original, *arguments), *rest)",
         "return (original.__new__, (type(self), *arguments), *rest)"),
    ),
    # Rotations of diffusers: other rows, other tables, other options.
    *mutants(
        "rope_ext/integrations/diffusers/rotations.py", "test_diffusers_rotations",
        ("heads-of-a-table-are-broadcast", "if x.dim() == 4 and axes[-2] == 1:",
         "if x.dim() == 4:"),
        ("matrices-are-read-transposed", "freqs[..., 0, 0], freqs[..., 1, 0]",
         "freqs[..., 0, 0], freqs[..., 0, 1]"),
    ),
    *mutants(
        "rope_ext/integrations/diffusers/forms.py", "test_diffusers_rotations",
        ("a-choice-that-is-no-rotation-is-left-out",
         "elif any(recognition.results(form) for form in forms):", "elif False:"),
        ("options-have-their-defaults", "keywords.get(name, options[name])", "options[name]"),
    ),
    # A rotation that has run before stays as it was.
    *mutants(
        "rope_ext/integrations/patching/method_copies.py",
        "test_patch_refusals test_patch_wrappers",
        ("rotations-kept-by-init-are-patched", 'name == "__init__":', 'name == "__new__":'),
    ),
    # Exported rotations turn the wrong way, or by the last rows of the table.
    *mutants(
        "rope_ext/integrations/onnx.py", "test_onnx",
        ("exported-inverse-is-no-transpose", "s1, s2 = op.Neg(s2), op.Neg(s1)",
         "s1, s2 = op.Neg(s1), op.Neg(s2)"),
        ("exported-positions-count-from-the-end", "op.Where(op.Less(ids, _int64(0)), refused, ids)",
         "ids"),
        ("exported-inverse-is-lost", "op.Neg(sin) if inverse else sin", "sin"),
    ),
    # Tokens of another sequence, positions of another token, scales the wrong way.
    *mutants(
        "rope_ext/integrations/reference_apis/flash_attention.py",
        "test_flash_attention test_reference_apis",
        ("first-token-of-packed-is-of-the-sequence-before",
         "torch.searchsorted(cu_seqlens, token, right=True) - 1",
         "torch.searchsorted(cu_seqlens, token, right=False) - 1"),
        ("v-is-rotated-too", "num_heads_k = (qkv.shape[2] - num_heads_q) // 2",
         "num_heads_k = qkv.shape[2] - num_heads_q"),
    ),
    # The same.
    *mutants(
        "rope_ext/integrations/reference_apis/rotary_embedding_torch.py", "test_reference_apis",
        ("keys-are-scaled-up", "k, seq_dim, 0, scale**-1)", "k, seq_dim, 0, scale)"),
        ("queries-begin-with-the-keys", "q, seq_dim, before + offset, None)",
         "q, seq_dim, offset, None)"),
    ),
    # The same.
    *mutants(
        "rope_ext/integrations/reference_apis/transformer_engine.py", "test_transformer_engine",
        ("starts-by-the-tokens-of-all-ranks",
         "positions.sequence_of_tokens(cu_seqlens // cp_size, tokens)",
         "positions.sequence_of_tokens(cu_seqlens, tokens)"),
    ),
]
