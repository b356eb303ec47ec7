"""Frequencies of every method and config, and positions of packed, padded and paged tokens."""
# fmt: off

from rooms.mutant import mutants

MUTANTS = [
    # Each changes the numbers, or the lengths at which they change.
    *mutants(
        "rope_ext/frequencies/basic.py", "test_frequencies test_frequencies_of_configs",
        ("proportional-without-its-factor", "(0, head_dim // 2 - rotated)) / factor, 1.0",
         "(0, head_dim // 2 - rotated)), 1.0"),
        ("proportional-over-the-part-that-rotates", "exponents(2 * rotated, device, head_dim)",
         "exponents(2 * rotated, device)"),
    ),
    *mutants(
        "rope_ext/frequencies/context.py", "test_frequencies test_frequencies_of_configs",
        ("ramp-of-yarn-ends-early", "math.floor(low), math.ceil(high)",
         "math.floor(low), math.floor(high)"),
        ("ramp-of-yarn-within-the-pairs", "min(high, rotary_dim - 1)",
         "min(high, rotary_dim // 2 - 1)"),
        ("yarn-by-the-logarithm-of-10", "0.1 * scale * math.log(factor) + 1.0",
         "0.1 * scale * math.log10(factor) + 1.0"),
        ("mscale-of-all-dims-without-effect", "growth(mscale) / growth(mscale_all_dim)",
         "growth(mscale)"),
        ("longrope-is-long-at-the-original-length", "length is not None and length > original",
         "length is not None and length >= original"),
        ("longrope-scales-by-the-square", "math.sqrt(1 + math.log(factor) / math.log(original))",
         "1 + math.log(factor) / math.log(original)"),
        ("llama3-has-no-ramp", "wavelengths < original / high_freq_factor",
         "wavelengths < original / low_freq_factor"),
        ("linear-without-its-factor", "(base ** exponents(rotary_dim, device)) / factor, 1.0",
         "(base ** exponents(rotary_dim, device)), 1.0"),
    ),
    *mutants(
        "rope_ext/frequencies/ntk_aware.py", "test_frequencies test_frequencies_of_configs",
        ("dynamic-stretches-from-the-start", "factor * longest / original - (factor - 1)",
         "factor * longest / original"),
        ("short-lengths-shrink-the-base", "length = length.clamp(min=original)",
         "length = length.clamp(min=1)"),
    ),
    *mutants(
        "rope_ext/frequencies/decay.py", "test_frequencies",
        ("decay-at-one-token", "(decay.log() / scale_base).float()", "decay.log().float()"),
    ),
    *mutants(
        "rope_ext/frequencies/spatial.py", "test_frequencies test_frequencies_of_configs",
        ("axes-do-not-take-turns", "inv_freq.view(-1, axes).t().contiguous()",
         "inv_freq.view(axes, -1)"),
        ("pixels-counted-from-one", "return inv_freq / (size - 1), 1.0",
         "return inv_freq / size, 1.0"),
    ),
    *mutants(
        "rope_ext/frequencies/scaling.py", "test_frequencies_of_configs test_embedding_scaling",
        ("shorter-longrope-is-refused", "max(1.0, max_position_embeddings / original)",
         "max_position_embeddings / original"),
        ("rope-theta-of-scaling-is-lost", "else theta if theta is not None else 10000.0",
         "else 10000.0"),
    ),
    *mutants(
        "rope_ext/frequencies/config.py",
        "test_frequencies_of_configs test_embedding_scaling",
        ("dynamic-by-its-own-original-length", "scaling.pop(original, None)", "pass"),
        ("no-config-is-interleaved", "default=model_type in INTERLEAVED)", "default=False)"),
        ("all-of-the-head-rotates", "return head_dim, int(head_dim * part)",
         "return head_dim, head_dim"),
        ("heads-of-zamba2-are-half", "2 * hidden if model_type", "hidden if model_type"),
    ),
    # Tokens at the bounds of sequences and blocks; positions that count from 1; padding.
    *mutants(
        "rope_ext/positions/sequences.py", "test_positions test_positions_of_grids",
        ("first-token-is-of-the-sequence-before",
         "torch.searchsorted(bounds[1:], token, right=True)",
         "torch.searchsorted(bounds[1:], token, right=False)"),
        ("padded-positions-from-1", "(counts.cumsum(1) - 1).masked_fill",
         "counts.cumsum(1).masked_fill"),
        ("padding-on-the-left-keeps-its-positions",
         "torch.where(positions < 0, padding, positions)",
         "torch.where(positions < -1, padding, positions)"),
    ),
    *mutants(
        "rope_ext/positions/paged_cache.py", "test_positions test_paged_decode",
        ("last-block-is-not-there", "within = index <= last", "within = index < last"),
        ("block-of-minus-1-has-slots", "found = (block >= 0) & within & known",
         "found = within & known"),
        ("sequence-without-pages-has-fewer-than-0-tokens", ".clamp(min=0) * page_size",
         " * page_size"),
    ),
    *mutants(
        "rope_ext/positions/ranks.py", "test_positions_of_ranks",
        ("second-chunk-is-one-too-far", "2 * world - 2 - rank)", "2 * world - 1 - rank)"),
    ),
    *mutants(
        "rope_ext/positions/grids.py", "test_positions_of_grids",
        ("merged-patches-in-rows", ".unflatten(-1, (width, merge)).transpose(-3, -2)",
         ".unflatten(-1, (width, merge))"),
        ("centres-at-the-edge-of-patches", " + 0.5) / size)", ") / size)"),
    ),
    *mutants(
        "rope_ext/positions/multimodal.py", "test_positions_of_grids",
        ("empty-images-take-positions", "(largest if ids.shape[1] > 0 else 0)", "largest"),
        ("text-begins-at-the-last-frame", "largest = ids.amax() + 1", "largest = ids.amax()"),
        ("video-takes-no-more-than-a-frame", "largest = max(frames, height, width)",
         "largest = max(height, width)"),
    ),
]
