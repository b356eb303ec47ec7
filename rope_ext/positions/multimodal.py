"""M-RoPE: positions of text with images and videos on three axes, and the axis of each pair.

    position_ids = positions.mrope([5, (1, 4, 6), 12])   # text, an image of 4 x 6 tokens, text
    axes = positions.mrope_axes([16, 24, 24])            # time, height, width of the 64 pairs
    cos, sin = cos_sin(inv_freq, position_ids, axes=axes)

Pair i of a token rotates by position ``position_ids[axes[i]]``. Text has the same position on all
axes, and so the angles of plain RoPE. If cos and sin of each axis exist already,
:func:`mrope_rows` selects the axis of each pair.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from rope_ext._argument_errors import check_type
from rope_ext.positions.checks import (
    Device,
    check_device,
    check_integers,
    check_list,
    check_mask,
    check_shape,
    check_size,
    check_tensor,
    refuse,
    values_known,
)
from rope_ext.positions.grids import grid

# A number of text tokens; or frames, height and width in tokens; or these and the frames' step.
Segment = int | tuple[int, int, int] | tuple[int, int, int, float]
After = Literal["max", "space"]
Leftover = Literal["first", "last"]


def mrope(segments: Sequence[Segment], *, after: After = "max", device: Device = None) -> Tensor:
    """Positions of a sequence of text, images and videos, on the axes time, height and width.

    Text continues where the last segment ended, with equal positions on the three axes. An image or
    a video is a grid that starts there, with different positions on each axis. Packed sequences are
    joined: ``torch.cat([mrope(a), mrope(b)], 1)``.

    Args:
        segments: in order: an int, the number of text tokens; or a tuple (frames, height, width) in
            tokens (after patches are merged), 1 frame for an image. A fourth number is the step
            from one frame to the next, ``tokens_per_second * second_per_grid_t`` in Qwen2.5-VL:
            positions are ``floor(frame * step)``. If timestamps stand between the frames of a
            video, as in Qwen3-VL, each frame is a segment.
        after: where the next segment starts. "max": after the largest position so far, as in the
            Qwen2-VL paper, transformers 4 and vLLM. "space": after the larger of height and width,
            as in transformers 5. They differ only if a video has more frames than that.
        device: of the result.

    Returns:
        int64 [3, T]. The next generated token is at the largest position + 1, on each axis.

    Raises:
        ValueError: for an invalid segment or `after`.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1; get_rope_index of transformers.
    """
    return _mrope("mrope", segments, after, device)


def mrope_batch(
    sequences: Sequence[Sequence[Segment]],
    attention_mask: Tensor | None = None,
    *,
    after: After = "max",
    device: Device = None,
) -> Tensor:
    """Positions of several sequences, each as from :func:`mrope`, padded to one length.

    Args:
        sequences: the segments of each.
        attention_mask: bool or int [B, S]: 1 for tokens; row b has as many as sequence b has.
            None: sequences are padded on the right, to the longest.
        after: as for :func:`mrope`.
        device: of the result. None: that of attention_mask, or the default device.

    Returns:
        int64 [3, B, S]; 0 for padding.

    Raises:
        ValueError: as :func:`mrope`; for no sequences, for an attention_mask of another shape and,
            on the CPU, for one with other numbers of tokens.
        TypeError: for a wrong type in place of a list or a tensor.

    Source: as for :func:`mrope`; padding has position 0 as in transformers 5.
    """
    function = "mrope_batch"
    check_list(function, "sequences", sequences)
    if len(sequences) == 0:
        refuse(function, "at least one sequence", "none")
    if attention_mask is not None:
        check_tensor(function, "attention_mask", attention_mask)
        device = attention_mask.device if device is None else device
    rows = [_mrope(function, segments, after, device) for segments in sequences]
    longest = max(row.shape[1] for row in rows)
    padded = torch.stack([pad(row, (0, longest - row.shape[1])) for row in rows], 1)
    if attention_mask is None:
        return padded
    counts = check_mask(function, attention_mask)
    if counts.shape[0] != len(rows):
        expected = f"attention_mask to have shape [B, S] with B = {len(rows)}"
        refuse(function, expected, list(counts.shape))
    if values_known(attention_mask):
        lengths = [row.shape[1] for row in rows]
        if counts.sum(1).tolist() != lengths:
            expected = f"attention_mask with the sequences' numbers of tokens, {lengths}"
            refuse(function, expected, counts.sum(1).tolist())
    if longest == 0:
        return padded.new_zeros(3, *counts.shape)
    counts = counts.to(padded.device)
    # Index of each token in its sequence. gather, as a mask would need the number of tokens.
    index = (counts.cumsum(1) - 1).clamp(0, longest - 1)
    return padded.gather(2, index.expand(3, -1, -1)).masked_fill(~counts, 0)


def mrope_axes(
    sections: Sequence[int],
    *,
    interleaved: bool = False,
    leftover: Leftover = "first",
    device: Device = None,
) -> Tensor:
    """The axis of each pair: 0, 1, 2 for time, height, width.

    Args:
        sections: pairs of each axis, in their order (mrope_section of Hugging Face, the four
            ``rope.dimension_sections`` of a GGUF file).
        interleaved: False: the pairs of an axis are neighbours (Qwen2-VL, GLM-4V). True: the axes
            take turns: pair j belongs to axis j % A, if that axis has pairs left (Qwen3-VL).
        leftover: if interleaved, the axis of the pairs whose turn falls on an axis without pairs
            left. "first", as in transformers. "last", as in ggml (llama.cpp's IMROPE): the last
            section, which then takes no turns. Its position is 0 in llama.cpp, so these pairs do
            not rotate: position_ids are [4, ...],
            ``torch.nn.functional.pad(mrope(...), (0, 0, 0, 1))``. For [24, 20, 20, 0] they are
            pairs 61 and 62, which in transformers belong to time.
        device: of the result.

    Returns:
        int64 [P], where P is the sum of sections.

    Raises:
        ValueError: for sections that are not numbers of pairs; if interleaved, for an unknown
            leftover, and with "first" for a section with more pairs than turns.

    Source: recomposition_frequencies of transformers' Qwen2-VL and Qwen3-VL; for "last",
    ``ggml_mrope_cache_init`` in llama.cpp's ggml/src/ggml-cpu/ops.cpp, which gives the pairs of
    sections that are too large to the last axis.
    """
    function = "mrope_axes"
    if not interleaved:
        return _axes(function, "sections", sections, device)
    _check_pairs(function, "sections", sections)
    if leftover not in ("first", "last"):
        refuse(function, "leftover to be 'first' or 'last'", repr(leftover))
    last = leftover == "last"
    turns = len(sections) - last
    axes = [turns if last else 0] * sum(sections)
    for axis in range(turns):
        places = range(axis, len(axes), turns)[: sections[axis]]
        if axis > 0 and not last and len(places) < sections[axis]:
            expected = f"sections[{axis}] to be at most {len(places)}, every {turns}th of the pairs"
            refuse(function, expected, sections[axis])
        for place in places:
            axes[place] = axis
    return torch.tensor(axes, dtype=torch.int64, device=device)


def mrope_rows(cos: Tensor, sin: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of cos and sin from those of each axis: pair i of a token is that of axis ``axes[i]``.

    For tables of all axes that another library made (Qwen2-VL of transformers 4, Liger, the rows
    that vLLM reads from its cache). ``cos_sin(inv_freq, position_ids, axes=axes)`` makes the rows
    directly.

    Args:
        cos: [A, ..., W], such as [A, B, S, W] or [A, T, W], any dtype: a row of each axis for each
            token.
        sin: as cos.
        axes: int32 or int64 [W], each in [0, A): the axis of each column, ``mrope_axes(sections)``
            for W = P. If W = 2P with equal halves, cut them, ``cos[..., :P]``, or repeat the axes,
            ``axes.repeat(2)``.

    Returns:
        cos, sin: [..., W], of cos's dtype, copied exactly. Differentiable, twice.

    Raises:
        ValueError: for wrong shapes, dtypes and devices, and on the CPU for an axis outside of
            [0, A). On other devices and in graphs the columns of such an axis become NaN.

    Source: apply_multimodal_rotary_pos_emb of Qwen2-VL; MRotaryEmbedding of vLLM.
    """
    function = "mrope_rows"
    check_integers(function, "axes", axes, "[W]")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(function, name, table)
        if table.dim() < 2 or table.shape[0] == 0 or table.shape[-1] != axes.shape[0]:
            got = list(table.shape)
            refuse(function, f"{name} to have shape [A, ..., {axes.shape[0]}], as axes has", got)
        check_device(function, name, table, "axes", axes)
    check_shape(function, "sin", sin, "of cos", *cos.shape)
    if cos.dtype != sin.dtype or not cos.is_floating_point():
        refuse(function, "cos and sin of one floating dtype", f"{cos.dtype} and {sin.dtype}")
    count = cos.shape[0]
    outside = (axes < 0) | (axes >= count)
    if values_known(axes) and outside.any():
        at = int(outside.nonzero()[0])
        refuse(function, f"axes in [0, {count}), of cos", f"{axes[at].item()} at index [{at}]")
    index = axes.long().clamp(0, count - 1).expand(1, *cos.shape[1:])
    cos, sin = (t.gather(0, index)[0].masked_fill(outside, torch.nan) for t in (cos, sin))
    return cos, sin


def axial_axes(pairs_per_axis: Sequence[int], *, device: Device = None) -> Tensor:
    """The axis of each pair, if the pairs of every axis are neighbours.

    For ``inv_freq, _ = frequencies.axial(head_dim, axes=2)``, the frequencies of each axis, use
    ``axial_axes([len(inv_freq)] * 2)`` with ``inv_freq.repeat(2)``. HunYuan-VL has one angle a
    channel, and the channels of an axis are neighbours: ``axial_axes([2 * n for n in sections])``
    with ``inv_freq.repeat(2)`` and rotary_dim.

    Args:
        pairs_per_axis: how many pairs each axis has, in their order.
        device: of the result.

    Returns:
        int64 [P], P the sum of pairs_per_axis.

    Raises:
        ValueError: unless pairs_per_axis is a list of numbers of pairs.
    """
    return _axes("axial_axes", "pairs_per_axis", pairs_per_axis, device)


def _axes(function: str, name: str, pairs: Sequence[int], device: Device) -> Tensor:
    _check_pairs(function, name, pairs)
    axes = [axis for axis, count in enumerate(pairs) for _ in range(count)]
    return torch.tensor(axes, dtype=torch.int64, device=device)


def _check_pairs(function: str, name: str, pairs: Sequence[int]) -> None:
    check_list(function, name, pairs)
    if len(pairs) == 0:
        refuse(function, f"{name} to have an entry for each axis", "none")
    for i, count in enumerate(pairs):
        check_size(function, f"{name}[{i}]", count)


def _mrope(function: str, segments: Sequence[Segment], after: After, device: Device) -> Tensor:
    if after not in ("max", "space"):
        refuse(function, "after to be 'max' or 'space'", repr(after))
    check_list(function, "segments", segments)
    parts = [torch.zeros(3, 0, dtype=torch.int64, device=device)]
    start: int | Tensor = 0  # a tensor on the device after frames with a step
    for i, segment in enumerate(segments):
        name = f"segments[{i}]"
        if not isinstance(segment, tuple):
            check_size(function, name, segment)
            parts.append((torch.arange(segment, device=device) + start).expand(3, -1))
            start = start + segment
            continue
        if len(segment) not in (3, 4):
            expected = f"{name} to be (frames, height, width) or (frames, height, width, step)"
            refuse(function, expected, segment)
        frames, height, width = segment[:3]
        for size in segment[:3]:
            check_size(function, name, size)
        ids = grid(frames, height, width, device=device)  # [3, tokens]
        largest: int | Tensor = max(height, width)
        if len(segment) == 4:
            check_type(f"rope_ext.positions.{function}", f"{name}[3]", segment[3], float)
            if not segment[3] >= 0:
                refuse(function, f"{name}[3], the step of frames, to be at least 0", segment[3])
            # Rounded as in transformers.
            ids = torch.cat(((ids[:1].float() * segment[3]).long(), ids[1:]))
            if after == "max" and ids.shape[1] > 0:
                largest = ids.amax() + 1
        elif after == "max":
            largest = max(frames, height, width)
        parts.append(ids + start)
        start = start + (largest if ids.shape[1] > 0 else 0)
    return torch.cat(parts, 1)
