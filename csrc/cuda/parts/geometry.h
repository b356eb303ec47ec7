// How work is divided into blocks of threads: plain arithmetic from shapes to launch dimensions.
//
// No CUDA here, so that it can be tested on any machine, for shapes that no machine could hold.
#pragma once

#include <cstdint>

namespace rope::cuda {

constexpr int kBlockThreads = 256;
constexpr int kWarpThreads = 32;
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridY = 65535;  // and gridDim.z

// <algorithm> would cost nvcc time for each architecture.
inline constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline constexpr int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }
inline constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Grid {
  uint32_t x, y, z;
};

// Blocks in one row, numbered blockIdx.y * gridDim.x + blockIdx.x; the last may have nothing to do.
inline Grid grid_of(int64_t blocks) {
  const int64_t y = ceil_div(blocks, kMaxGridX);
  return {static_cast<uint32_t>(ceil_div(blocks, y)), static_cast<uint32_t>(y), 1};
}

inline int64_t whole_warps(int64_t threads) {
  return ceil_div(threads, kWarpThreads) * kWarpThreads;
}

// The rotations. A group of threads, about a warp, works on one token: fragment_lanes threads lie
// along a head, and head_lanes such rows of threads take one head each and step through the heads.
// Each thread keeps the table's values of its fragment for all of its heads, so a group reads the
// table row once.
//
// When tokens alone do not fill the GPU, `splits` groups share a token and read its table row once
// each: at most once for each head_lanes heads, and exactly once in all from
// sm_count * kFullThreads / (fragment_lanes * head_lanes) tokens on. A head longer than a block is
// divided into fragment_chunks, and its table row with it. The groups of one token, `parts` in all,
// are neighbours: they lie in at most ceil((parts - 1) / groups_per_block) + 1 blocks.
//
// A block stays within one sequence; sequence b is blockIdx.z * gridDim.y + blockIdx.y.
struct RotaryGeometry {
  uint32_t fragment_lanes, head_lanes;
  uint32_t splits, fragment_chunks;
  uint32_t parts;   // splits * fragment_chunks
  uint32_t groups;  // of one sequence: seq * parts
  uint32_t groups_per_block;
  uint32_t block_threads;
  Grid grid;
};

constexpr int64_t kFullThreads = 2048;  // resident threads of one multiprocessor
constexpr int64_t kWantedBlocks = 4;    // a multiprocessor, before blocks grow beyond one group

// Longer sequences take several launches: the kernel counts the groups of one in 32 bits.
inline int64_t most_tokens(int64_t fragments) {
  return (int64_t{1} << 30) / ceil_div(fragments, kBlockThreads);
}

// fragments: of one head. All sizes > 0; seq <= most_tokens(fragments).
inline RotaryGeometry rotary_geometry(int64_t fragments, int64_t heads, int64_t batch, int64_t seq,
                                      int64_t sm_count) {
  const int64_t fragment_lanes = min_of(fragments, kBlockThreads);
  const int64_t fragment_chunks = ceil_div(fragments, fragment_lanes);
  const int64_t head_lanes = min_of(max_of(kWarpThreads / fragment_lanes, 1), heads);
  const int64_t lanes = fragment_lanes * head_lanes;

  const int64_t most_splits = ceil_div(heads, head_lanes);
  const int64_t wanted = ceil_div(sm_count * kFullThreads, batch * seq * fragment_chunks * lanes);
  const int64_t passes = ceil_div(most_splits, min_of(wanted, most_splits));
  const int64_t splits = ceil_div(most_splits, passes);

  const int64_t parts = splits * fragment_chunks;
  const int64_t groups = seq * parts;
  const int64_t share = batch * groups / (kWantedBlocks * sm_count);
  const int64_t most_groups = min_of(max_of(share, 1), kBlockThreads / lanes);
  const int64_t blocks = ceil_div(groups, most_groups);
  const int64_t groups_per_block = ceil_div(groups, blocks);

  const int64_t grid_z = ceil_div(batch, kMaxGridY);
  const auto u32 = [](int64_t count) { return static_cast<uint32_t>(count); };
  return {u32(fragment_lanes),
          u32(head_lanes),
          u32(splits),
          u32(fragment_chunks),
          u32(parts),
          u32(groups),
          u32(groups_per_block),
          u32(whole_warps(groups_per_block * lanes)),
          Grid{u32(blocks), u32(ceil_div(batch, grid_z)), u32(grid_z)}};
}

// rotary_table_grad. One block for each row of the gradient: fragment_lanes threads lie along a
// head, and head_lanes * token_lanes such rows of threads (powers of two) share the heads and
// tokens that use the row. It depends on shapes alone, and so does the order of the sum.
struct TableGradGeometry {
  int fragment_lanes, head_lanes, token_lanes;
  uint32_t block_threads;
  Grid grid;
};

inline int64_t largest_power_of_two(int64_t limit) {
  int64_t power = 1;
  while (2 * power <= limit) power *= 2;
  return power;
}

// tokens_per_row: about how many tokens use one row.
inline TableGradGeometry table_grad_geometry(int64_t fragments, int64_t heads,
                                             int64_t tokens_per_row, int64_t rows) {
  const int64_t fragment_lanes = min_of(fragments, kBlockThreads);
  const int64_t lanes = kBlockThreads / fragment_lanes;
  // The most lanes that leave at most a fifth of them without a head in the last pass.
  int64_t head_lanes = largest_power_of_two(lanes);
  while (head_lanes > 1 && ceil_div(heads, head_lanes) * head_lanes * 4 > heads * 5) {
    head_lanes /= 2;
  }
  const int64_t token_lanes =
      largest_power_of_two(min_of(lanes / head_lanes, max_of(tokens_per_row, 1)));
  return {
      static_cast<int>(fragment_lanes), static_cast<int>(head_lanes), static_cast<int>(token_lanes),
      static_cast<uint32_t>(whole_warps(fragment_lanes * head_lanes * token_lanes)), grid_of(rows)};
}

// Tables [rows, columns] with a thread for each entry: columns of one row side by side.
struct EntryGeometry {
  int column_lanes, rows_per_block;
  uint32_t block_threads;
  Grid grid;
};

inline EntryGeometry entry_geometry(int64_t columns, int64_t rows) {
  const int64_t column_lanes = min_of(columns, kBlockThreads);
  const int64_t rows_per_block = min_of(kBlockThreads / column_lanes, rows);
  return {static_cast<int>(column_lanes), static_cast<int>(rows_per_block),
          static_cast<uint32_t>(whole_warps(column_lanes * rows_per_block)),
          grid_of(ceil_div(rows, rows_per_block))};
}

}  // namespace rope::cuda
