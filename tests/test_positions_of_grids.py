"""Positions of images, videos and text with them, compared to those of transformers."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits, error_of

import rope_ext
from rope_ext import positions

pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")
from transformers import vision_utils
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.hunyuan_vl import modeling_hunyuan_vl
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

drawn = settings(deadline=None, derandomize=True, database=None, max_examples=60)
MERGE = 2  # patches on each side of a token, in transformers' grids


def test_patches_are_in_the_order_of_transformers():
    _, height, width = sizes = (2, 6, 12)
    for merge in (1, 2, 3):
        expected = vision_utils.get_vision_position_ids(
            torch.tensor([sizes]), merge, include_temporal=True
        )
        video = positions.grid(*sizes, merge=merge)
        assert video.dtype == torch.int64
        assert torch.equal(video, expected.t())
        image = positions.grid(height, width, merge=merge)
        assert torch.equal(image, expected[: height * width, 1:].t())


def test_grids_may_be_empty_and_on_a_device():
    for function in (positions.grid, positions.patch_centers):
        assert function(0, 4).shape == (2, 0)
        assert function(3, 0, 4).shape == (3, 0)
        assert function(2, 4, device="meta").device.type == "meta"


def test_centers_of_patches_have_the_bits_of_dinov3():
    theirs = modeling_dinov3_vit.get_patches_center_coordinates
    for height, width in ((1, 1), (3, 7), (100, 64)):
        for dtype in (torch.float32, torch.float64):
            expected = theirs(height, width, dtype=dtype, device=torch.device("cpu"))
            got = positions.patch_centers(height, width, dtype=dtype)
            assert got.dtype == dtype
            assert torch.equal(got, expected.t())
    volume = positions.patch_centers(2, 4, 5)
    for axis, (index, size) in enumerate(zip(positions.grid(2, 4, 5), (2, 4, 5), strict=True)):
        torch.testing.assert_close(volume[axis], (2 * index + 1.0) / size - 1)


text = st.integers(1, 6)
image = st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5))
video = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))


@st.composite
def prompts(draw):
    segments = [draw(text)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        segments += [draw(image | video), draw(text)]
    return segments or [draw(text)]


def types_of(segment):
    """Of each token: 0 in text, 1 in an image, 2 in a video."""
    if isinstance(segment, int):
        return [0] * segment
    return [1 if segment[0] == 1 else 2] * (segment[0] * segment[1] * segment[2])


def padded(rows, on_the_left):
    """[B, T] of lists of numbers, with zeros on one side."""
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    side = "left" if on_the_left else "right"
    return pad_sequence([torch.tensor(row) for row in rows], True, padding_side=side)


def of_transformers(model, sequences, padded_left=True, **options):
    """Positions by a class of transformers, without its weights; and the mask."""
    types = [[kind for segment in row for kind in types_of(segment)] for row in sequences]
    mask = padded([[1] * len(row) for row in types], padded_left)
    types = padded(types, padded_left)
    grids = [s for row in sequences for s in row if not isinstance(s, int)]
    patches = [[f, h * MERGE, w * MERGE] for f, h, w in grids]
    images = torch.tensor([grid for grid in patches if grid[0] == 1])
    videos = torch.tensor([grid for grid in patches if grid[0] != 1])
    vision_config = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=2)
    of_model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision_config),
        get_vision_position_ids=partial(model.get_vision_position_ids, None),
    )
    ids, _ = model.get_rope_index(
        of_model, types, types, images, videos, attention_mask=mask, **options
    )
    return ids, mask


@drawn
@given(st.lists(prompts(), min_size=1, max_size=3), st.booleans())
def test_a_padded_batch_has_the_positions_of_qwen2_vl(sequences, padded_left):
    model = modeling_qwen2_vl.Qwen2VLModel
    expected, mask = of_transformers(model, sequences, padded_left)
    got = positions.mrope_batch(sequences, mask, after="space")
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)
    assert torch.equal(got, positions.mrope_batch(sequences, mask.bool(), after="space"))
    if not padded_left:
        assert torch.equal(got, positions.mrope_batch(sequences, after="space"))
    if len(sequences) == 1:
        assert torch.equal(positions.mrope(sequences[0], after="space"), expected[:, 0])


@drawn
@given(prompts(), st.floats(0, 4))
def test_frames_are_as_far_apart_as_in_qwen2_5_vl(segments, seconds):
    model = modeling_qwen2_5_vl.Qwen2_5_VLModel
    options = {"second_per_grid_ts": [seconds] * len(segments)}
    expected, _ = of_transformers(model, [segments], **options)
    spaced = [  # 2 tokens a second
        s if isinstance(s, int) or s[0] == 1 else (*s, 2 * seconds) for s in segments
    ]
    assert torch.equal(positions.mrope(spaced, after="space"), expected[:, 0])


def test_the_next_segment_begins_past_the_largest_position():
    """Where a video has more frames than rows and columns, `after` tells."""
    assert positions.mrope([2, (3, 2, 1, 2.5), 1]).t().tolist() == [
        [0] * 3, [1] * 3, [2, 2, 2], [2, 3, 2], [4, 2, 2], [4, 3, 2], [7, 2, 2], [7, 3, 2], [8] * 3
    ]  # fmt: skip
    segments = [2, (5, 1, 2), 1]
    assert positions.mrope(segments)[:, -1].tolist() == [7, 7, 7]
    assert positions.mrope(segments, after="space")[:, -1].tolist() == [4, 4, 4]


def test_segments_may_be_empty():
    assert positions.mrope([]).shape == (3, 0)
    assert positions.mrope([0, (0, 3, 3), (2, 0, 4, 1.5), 2])[0].tolist() == [0, 1]
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert positions.mrope_batch([[], [0]], mask).tolist() == [[[0] * 3] * 2] * 3


def gathered(freq, axes):
    """freq [A, ..., P] -> [..., P], each pair of its axis."""
    return torch.stack([freq[axis, ..., pair] for pair, axis in enumerate(axes.tolist())], -1)


# And whether axes take turns: then it is Qwen3-VL's way.
SECTIONS = [([16, 24, 24], False), ([24, 20, 20], True), ([11, 11, 10], True), ([6, 1, 1], True)]


def test_pairs_are_of_the_axes_that_transformers_gives_them():
    position_ids = positions.mrope([3, (1, 4, 5), (2, 3, 2), 2])[:, None]  # [3, 1, T]
    for sections, interleaved in SECTIONS:
        inv_freq, _ = rope_ext.frequencies.default(2 * sum(sections))
        axes = positions.mrope_axes(sections, interleaved=interleaved)
        assert axes.dtype == torch.int64
        module = modeling_qwen2_vl.Qwen2VLRotaryEmbedding
        if interleaved:
            module = modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding
        freq, _ = rope_ext.cos_sin(inv_freq, position_ids)  # [3, 1, T, P]
        of_module = SimpleNamespace(mrope_section=sections)
        expected = module.recomposition_frequencies(of_module, freq.clone())
        assert torch.equal(gathered(freq, axes).repeat(1, 1, 2), expected)


def test_pairs_are_of_the_axes_that_ggml_gives_them():
    """ggml_mrope_cache_init of llama.cpp, IMROPE, with positions of 0 on the last axis."""
    for sections in ([24, 20, 20, 0], [11, 11, 10, 0], [2, 1, 1, 4], [1, 7, 0, 2]):
        expected = [
            pair % 3 if pair < 3 * sections[pair % 3] else 3 for pair in range(sum(sections))
        ]
        axes = positions.mrope_axes(sections, interleaved=True, leftover="last")
        assert axes.dtype == torch.int64
        assert axes.tolist() == expected


@pytest.mark.parametrize("interleaved", [False, True], ids=["sections", "taking turns"])
def test_rows_are_picked_from_the_tables_of_each_axis(interleaved, device):
    dtype = torch.bfloat16 if interleaved else torch.float32
    inv_freq = rope_ext.frequencies.default(16)[0].to(device)
    ids = positions.mrope([3, (1, 4, 5), 2], device=device)[:, None].expand(3, 2, -1)
    axes = positions.mrope_axes([4, 2, 2], interleaved=interleaved, device=device)
    tables = rope_ext.cos_sin(inv_freq, ids, dtype=dtype)
    expected = rope_ext.cos_sin(inv_freq, ids, axes=axes, dtype=dtype)
    for got in (
        positions.mrope_rows(*tables, axes.int()),
        positions.mrope_rows(*(t[:, 0] for t in tables), axes),  # packed, as vLLM has them
        [t[..., :8] for t in positions.mrope_rows(*(t.tile(2) for t in tables), axes.tile(2))],
    ):
        for rows, same in zip(got, expected, strict=True):
            assert_same_bits(rows.expand_as(same), same)
    leaf = tables[0].double().requires_grad_()
    (grad,) = torch.autograd.grad(positions.mrope_rows(leaf, leaf, axes)[0].sum(), leaf)
    picked = torch.nn.functional.one_hot(axes, 3).T.double()[:, None, None]
    assert torch.equal(grad, picked.expand_as(grad))


def test_an_axis_that_is_not_there_makes_nan_in_a_graph():
    cos = torch.randn(3, 4, 2)
    compiled = torch.compile(positions.mrope_rows, backend="eager", fullgraph=True)
    rows, _ = compiled(cos, cos, torch.tensor([1, 3]))
    assert torch.equal(rows[:, 0], cos[1, :, 0])
    assert rows[:, 1].isnan().all()


def test_channels_are_of_the_axes_that_hunyuan_gives_them():
    sections = [16, 8, 24, 16]
    inv_freq, _ = rope_ext.frequencies.default(128)
    position_ids = torch.arange(4 * 7).view(4, 1, 7)
    cos, _ = rope_ext.cos_sin(inv_freq, position_ids)  # [4, 1, 7, P]
    of_module = SimpleNamespace(mrope_section=sections)
    module = modeling_hunyuan_vl.HunYuanVLRotaryEmbedding
    expected = module.recomposition_frequencies(of_module, cos)
    axes = positions.axial_axes([2 * n for n in sections])
    assert torch.equal(gathered(cos.tile(2), axes), expected)


TABLE, AXES = torch.ones(3, 4, 2), torch.arange(2)

REFUSALS = {
    "grid": [
        ((3,), {}, r"\(height, width\) or \(frames, height, width\), got \(3,\)"),
        ((2, -1), {}, "width to be an integer of at least 0, got -1"),
        ((2, 3, 4), {"merge": 2}, "height to be a multiple of merge, 2, got 3"),
        ((2, 4), {"merge": 0}, "merge to be an integer of at least 1, got 0"),
    ],
    "patch_centers": [
        ((2, 2.0), {}, "width to be an integer of at least 0, got 2.0"),
        ((2, 2), {"dtype": torch.float16}, "dtype to be float32 or float64, got torch.float16"),
    ],
    "mrope": [
        (([-1],), {}, r"segments\[0\] to be an integer of at least 0, got -1"),
        (([1, (2, 3)],), {}, r"segments\[1\] to be \(frames, height, width\) or .*\(2, 3\)"),
        (([(1, 2, 3, -1.0)],), {}, r"segments\[0\]\[3\], the step .* at least 0, got -1.0"),
        (([1],), {"after": "time"}, "after to be 'max' or 'space', got 'time'"),
    ],
    "mrope_batch": [
        (([],), {}, "at least one sequence, got none"),
        (([[1]], torch.ones(2, 1).bool()), {}, r"\[B, S\] with B = 1, got \[2, 1\]"),
        (([[1]], torch.ones(1, 2).int()), {}, r"numbers of tokens, \[1\], got \[2\]"),
        (([[1]], torch.ones(1, 1)), {}, "dtype bool, int32 or int64, got torch.float32"),
    ],
    "mrope_axes": [
        (([],), {}, "sections to have an entry for each axis, got none"),
        (([1, -1],), {}, r"sections\[1\] to be an integer of at least 0, got -1"),
        (([1, 4, 1],), {"interleaved": True}, r"sections\[1\] to be at most 2, .*, got 4"),
        (([1],), {"interleaved": True, "leftover": 3}, "leftover to be 'first' or 'last', got 3"),
    ],
    "mrope_rows": [
        ((TABLE, TABLE, AXES.float()), {}, "axes of dtype int32 or int64, got torch.float32"),
        ((TABLE, TABLE, AXES[:1]), {}, r"cos to have shape \[A, ..., 1\], .*, got \[3, 4, 2\]"),
        ((TABLE, TABLE[:2], AXES), {}, r"sin to have shape of cos, \[3, 4, 2\], got \[2, 4, 2\]"),
        ((TABLE, TABLE.double(), AXES), {}, "cos and sin of one floating dtype, got .*float64"),
        ((TABLE, TABLE, AXES.to("meta")), {}, "cos on the device of axes, meta, got cpu"),
        ((TABLE, TABLE, AXES + 2), {}, r"axes in \[0, 3\), of cos, got 3 at index \[1\]"),
    ],
    "axial_axes": [(([],), {}, "pairs_per_axis to have an entry for each axis, got none")],
}


@pytest.mark.parametrize("function", REFUSALS)
def test_invalid_arguments_raise_and_are_named(function):
    for arguments, options, message in REFUSALS[function]:
        got = error_of(getattr(positions, function), *arguments, **options)
        assert re.match(rf"rope_ext\.positions\.{function}: expected .*{message}", got)
