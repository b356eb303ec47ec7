"""Bytes that the CUDA kernels move, counted by an emulator of the CUDA runtime.

The emulator executes the real launches and counts every access; see CONTRIBUTING.md. Without it,
and on a real GPU, these tests can't count.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import DTYPES, pairwise

import rope_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import operators_cuda

fakegpu_torch = pytest.importorskip(
    "fakegpu_torch", reason="no emulator of the CUDA runtime: bytes can't be counted"
)

pytestmark = pytest.mark.cuda

SECTOR = 32  # bytes: the least that memory moves


@dataclass(frozen=True)
class Shape:
    name: str
    q_heads: int
    k_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False
    rotary_offset: int = 0
    interleaved_out: bool | None = None

    @property
    def mixed(self) -> bool:
        """Reads one order of the pairs and writes the other."""
        return self.interleaved_out is not None and self.interleaved_out != self.interleaved

    def sectors_asked_twice(self, tokens: int, dtype: torch.dtype, interleaved: bool) -> int:
        """In the interleaved order of a rotation between two orders. There the two vectors of a
        thread are neighbours, and each asks for its half of a sector.
        """
        if not (self.mixed and interleaved):
            return 0
        return sectors(tokens * self.heads * self.rotary_dim * dtype.itemsize)

    @property
    def options(self) -> dict:
        return {
            "rotary_offset": self.rotary_offset,
            "interleaved": self.interleaved,
            "interleaved_out": self.interleaved_out,
        }

    @property
    def heads(self) -> int:
        return self.q_heads + self.k_heads


LLAMA = Shape("Llama-3-8B", 32, 8, 128, 128)
SHAPES = [
    LLAMA,
    Shape("SmolLM2, heads shorter than a warp", 9, 3, 64, 64),
    Shape("GPT-NeoX (Pythia-6.9B), a quarter rotates", 32, 32, 128, 32),
    Shape("GPT-J, interleaved", 16, 16, 256, 64, interleaved=True),
    Shape("Llama as Meta ships it, interleaved", 32, 8, 128, 128, interleaved=True),
    Shape("DeepSeek-V2, the last channels", 16, 1, 192, 64, True, rotary_offset=128),
    Shape("DeepSeek-V3, halves in the result", 16, 1, 192, 64, True, 128, interleaved_out=False),
    Shape("its backward", 16, 1, 192, 64, False, 128, interleaved_out=True),
]
KEEPING_ORDER = [s for s in SHAPES if not s.mixed]
STEPS = {"prefill": (1, 48), "prefill of two": (2, 24), "decode": (1, 1), "decode of 16": (16, 1)}


def by_name(shapes):
    return {shape.name: shape for shape in shapes}


def moved_by(call) -> SimpleNamespace:
    """What the emulator counted in one call: the bytes that threads asked for, and the sectors."""
    fakegpu_torch.reset()
    call()
    report = fakegpu_torch.stats()
    assert report["errors"] == []
    kernels = [k for name, k in report["kernels"].items() if "rope::" in name and k["launches"]]
    assert len(kernels) == 1
    for of in ("load", "store"):
        by_width = kernels[0][f"global_{of}s_by_width"]
        kernels[0][f"{of}_widths"] = {int(width) for width, count in by_width.items() if count}
    return SimpleNamespace(**kernels[0])


@pytest.fixture(autouse=True)
def _footprint():
    if os.environ.get("FAKEGPU_FOOTPRINT") != "1":
        pytest.skip("distinct sectors are counted only with FAKEGPU_FOOTPRINT=1")


def tensors(shape: Shape, batch: int, seq: int, dtype: torch.dtype):
    """q [B, S, Hq, D], k [B, S, Hk, D], cos and sin float32 [S, P]."""
    q = torch.randn(batch, seq, shape.q_heads, shape.head_dim).to(dtype).cuda()
    k = torch.randn(batch, seq, shape.k_heads, shape.head_dim).to(dtype).cuda()
    inv_freq, _ = rope_ext.frequencies.default(shape.head_dim, rotary_dim=shape.rotary_dim)
    cos, sin = rope_ext.cos_sin_cache(inv_freq, seq)
    return q, k, cos.cuda(), sin.cuda()


def sectors(byte_count: int) -> int:
    assert byte_count % SECTOR == 0
    return byte_count // SECTOR


def pairs_a_thread(shape: Shape, dtype: torch.dtype) -> int:
    """Pairs in 16 bytes of x, or of each half."""
    return (8 if shape.interleaved and not shape.mixed else 16) // dtype.itemsize


def table_bytes_a_thread(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a float32 cos: below 16 for two pairs, in float64 and in interleaved float32."""
    return 4 * pairs_a_thread(shape, dtype)


@pytest.mark.parametrize(
    ("shape", "step", "dtype"), pairwise(shape=by_name(SHAPES), step=STEPS, dtype=DTYPES)
)
def test_out_of_place_moves_every_element_once_in_and_once_out(shape, step, dtype):
    batch, seq = step
    q, k, cos, sin = tensors(shape, batch, seq, dtype)
    moved = moved_by(lambda: torch.ops.rope.apply_rotary_qk(q, k, cos, sin, **shape.options))
    channels = sectors((q.numel() + k.numel()) * dtype.itemsize)
    table = sectors(2 * cos.numel() * cos.itemsize)
    assert moved.launches == 1
    assert moved.store_widths == {16}
    assert moved.load_widths == {16, min(16, table_bytes_a_thread(shape, dtype))}
    assert moved.store_unique_sectors == channels
    assert moved.load_unique_sectors == channels + table
    twice = shape.sectors_asked_twice(batch * seq, dtype, bool(shape.interleaved_out))
    assert moved.store_sectors == channels + twice
    assert moved.store_efficiency == channels / (channels + twice)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_a_table_row_is_read_at_most_once_for_a_warp_of_heads(shape):
    """Few tokens: groups of about a warp share a token, and each reads its row (geometry.h). A lane
    reads its values in two 16-byte steps, so that each sector of the row is asked for up to twice.
    """
    dtype = torch.bfloat16
    batch, seq = STEPS["decode of 16"]
    q, k, cos, sin = tensors(shape, batch, seq, dtype)
    moved = moved_by(lambda: torch.ops.rope.apply_rotary_qk(q, k, cos, sin, **shape.options))
    channels = sectors((q.numel() + k.numel()) * dtype.itemsize)
    row = sectors(2 * cos[0].numel() * cos.itemsize)
    lanes = shape.rotary_dim // 2 // pairs_a_thread(shape, dtype)
    lanes += (shape.head_dim - shape.rotary_dim) * dtype.itemsize // 16
    most_readers = -(-shape.heads // max(1, 32 // lanes))
    channels += shape.sectors_asked_twice(batch * seq, dtype, shape.interleaved)
    assert moved.load_sectors - channels <= batch * seq * most_readers * 2 * row
    assert moved.blocks <= batch * seq * most_readers  # so at most as many share a token


def test_with_many_tokens_a_table_row_is_read_once():
    """From sm_count * 2048 threads on a token has one reader (geometry.h)."""
    shape = Shape("two heads of 64", 1, 1, 64, 64)
    lanes = 2 * 4  # 8 pairs a thread
    seq = torch.cuda.get_device_properties(0).multi_processor_count * 2048 // lanes
    q, k, cos, sin = tensors(shape, 1, seq, torch.bfloat16)
    moved = moved_by(lambda: torch.ops.rope.apply_rotary_qk(q, k, cos, sin))
    channels = sectors((q.numel() + k.numel()) * 2)
    table = sectors(2 * cos.numel() * cos.itemsize)
    assert moved.load_unique_sectors == channels + table
    assert moved.load_sectors - channels <= 2 * table


def test_strided_views_move_the_same_bytes():
    """q and k of one packed projection: each head is a dense run of whole sectors, so no other
    sector is touched.
    """
    batch, seq = STEPS["prefill"]
    heads = LLAMA.heads + LLAMA.k_heads
    packed = torch.randn(batch, seq, heads, LLAMA.head_dim).bfloat16().cuda()
    q = packed[:, :, : LLAMA.q_heads]
    k = packed[:, :, LLAMA.q_heads : LLAMA.heads]
    _, _, cos, sin = tensors(LLAMA, batch, seq, torch.bfloat16)
    moved = moved_by(lambda: torch.ops.rope.apply_rotary_qk_(q, k, cos, sin))
    channels = sectors((q.numel() + k.numel()) * 2)
    assert moved.load_widths == moved.store_widths == {16}
    assert moved.store_sectors == channels
    assert moved.store_efficiency == 1


# ---- with a cache

BLOCK_SIZE = 16


def appended(shape: Shape, step, dtype: torch.dtype, cache_dtype: torch.dtype, stored=True):
    """What apply_rotary_qk_append_kv_ moved; the bytes of rotated q and k, the channels of k, the
    bytes of the table, the sectors of the slots.
    """
    batch, seq = step
    tokens = batch * seq
    q, k, cos, sin = tensors(shape, batch, seq, dtype)
    v, blocks = k.clone(), -(-2 * tokens // BLOCK_SIZE)  # two slots for each token
    caches = torch.zeros(2, blocks, BLOCK_SIZE, *k.shape[2:]).to(cache_dtype).cuda()
    slots = torch.randperm(blocks * BLOCK_SIZE)[:tokens].view(batch, seq)
    slots = (slots if stored else torch.full_like(slots, -1)).cuda()
    options = {"rotary_offset": shape.rotary_offset, "interleaved": shape.interleaved}
    moved = moved_by(
        lambda: torch.ops.rope.apply_rotary_qk_append_kv_(
            q, k, v, *caches, slots, cos, sin, **options
        )
    )
    rotated = tokens * shape.heads * shape.rotary_dim * dtype.itemsize
    of_k = tokens * shape.k_heads * shape.head_dim
    return moved, rotated, of_k, 2 * cos.numel() * cos.itemsize, -(-tokens * 8 // SECTOR)


@pytest.mark.parametrize(
    ("shape", "step", "dtype", "cache_dtype"),
    pairwise(
        shape=by_name(KEEPING_ORDER),
        step=STEPS,
        dtype=DTYPES[1:],
        cache={"of the model": None, "float8": torch.float8_e4m3fn},
    ),
)
def test_append_moves_what_rotates_and_what_is_stored_once(shape, step, dtype, cache_dtype):
    """The channels of k that do not rotate are read and stored; those of q are not read."""
    cache_dtype = cache_dtype or dtype
    moved, rotated, of_k, table, of_slots = appended(shape, step, dtype, cache_dtype)
    k_stays = of_k // shape.head_dim * (shape.head_dim - shape.rotary_dim) * dtype.itemsize
    assert moved.launches == 1
    assert moved.store_widths == {16, 16 * cache_dtype.itemsize // dtype.itemsize}
    assert moved.load_unique_sectors == of_slots + sectors(
        rotated + k_stays + of_k * dtype.itemsize + table
    )
    written = sectors(rotated + 2 * of_k * cache_dtype.itemsize)
    assert moved.store_unique_sectors == written
    run = shape.rotary_dim // (1 if shape.interleaved else 2) * cache_dtype.itemsize
    if run % SECTOR == 0:  # else two runs share a sector
        assert moved.store_sectors == written


@pytest.mark.parametrize(
    ("shape", "step", "norm", "own_scales"),
    pairwise(
        shape=by_name(KEEPING_ORDER[:4]),
        step=STEPS,
        norm={"no norm": False, "norm": True},
        own_scales={"one scale": False, "own scales": True},
    ),
)
def test_append_with_a_float8_q_reads_q_once_and_writes_a_byte_a_channel(
    shape, step, norm, own_scales
):
    """Without a norm, k is written back only where it rotates."""
    batch, seq = step
    tokens = batch * seq
    q, k, cos, sin = tensors(shape, batch, seq, torch.bfloat16)
    blocks = -(-2 * tokens // BLOCK_SIZE)
    caches = torch.zeros(2, blocks, BLOCK_SIZE, *k.shape[2:]).bfloat16().cuda()
    slots = torch.randperm(blocks * BLOCK_SIZE)[:tokens].view(batch, seq).cuda()
    options = {"interleaved": shape.interleaved}
    options["q_out"] = torch.zeros(q.shape).to(torch.float8_e4m3fn).cuda()
    if own_scales:
        options["q_scale_out"] = torch.zeros(q.shape[:-1]).cuda()
    else:
        options["q_scale"] = torch.ones(1).cuda()
    weights = torch.ones(2, shape.head_dim).bfloat16().cuda() if norm else ()
    operator = "rms_norm_rotary_qk_append_kv_" if norm else "apply_rotary_qk_append_kv_"
    append = getattr(torch.ops.rope, operator)
    moved = moved_by(lambda: append(q, k, k.clone(), *caches, slots, *weights, cos, sin, **options))
    scales = -(-tokens * shape.q_heads * 4 // SECTOR) if own_scales else 1
    of_weights = sectors(2 * shape.head_dim * 2) if norm else 0
    of_slots = -(-tokens * 8 // SECTOR)
    assert moved.launches == 1
    assert moved.load_unique_sectors == of_slots + of_weights + (not own_scales) + sectors(
        2 * (q.numel() + 2 * k.numel()) + 2 * cos.numel() * cos.itemsize
    )
    k_written = tokens * shape.k_heads * (shape.head_dim if norm else shape.rotary_dim)
    written = sectors(q.numel() + 2 * (k_written + 2 * k.numel()))
    assert moved.store_unique_sectors == written + (scales if own_scales else 0)


def test_append_reads_no_v_that_is_not_stored():
    moved, rotated, _, table, of_slots = appended(
        LLAMA, STEPS["prefill"], torch.bfloat16, torch.bfloat16, stored=False
    )
    assert moved.load_unique_sectors == of_slots + sectors(rotated + table)
    assert moved.store_unique_sectors == sectors(rotated)


# ---- the benchmark's numbers

# These write sums, which a second launch reads.
PARTIAL_SUMS = ("cos_sin_backward", "rms_norm_rotary_qk_backward")


@pytest.mark.parametrize("case", operators_cuda.cases(quick=True), ids=lambda case: case.label)
def test_the_benchmark_expects_the_bytes_that_an_operator_moves(case):
    (call,) = case.make(1)
    fakegpu_torch.reset()
    call()
    report = fakegpu_torch.stats()
    assert report["errors"] == []
    kernels = [kernel for name, kernel in report["kernels"].items() if "rope::" in name]
    moved = SECTOR * sum(k["load_unique_sectors"] + k["store_unique_sectors"] for k in kernels)
    if case.name.startswith(PARTIAL_SUMS):
        assert moved > case.least_bytes
    else:
        assert moved == case.least_bytes
