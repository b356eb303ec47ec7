// How work is cut into blocks of threads: plain arithmetic from shapes to launch dimensions.
//
// No CUDA here, so that it can be tested on any machine, for shapes that no machine could hold.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rope::cuda {

constexpr int kBlockThreads = 256;
constexpr int kWarpThreads = 32;
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;  // gridDim.x; gridDim.y ends at 65535

inline constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Blocks are numbered blockIdx.y * gridDim.x + blockIdx.x; the last ones may have nothing to do.
struct Grid {
  uint32_t x, y;
};

inline Grid grid_of(int64_t blocks) {
  const int64_t y = ceil_div(blocks, kMaxGridX);
  return {static_cast<uint32_t>(ceil_div(blocks, y)), static_cast<uint32_t>(y)};
}

inline int whole_warps(int threads) {
  return static_cast<int>(ceil_div(threads, kWarpThreads)) * kWarpThreads;
}

// apply_rotary. A group of threads, about a warp, works on one token: unit_lanes of them lie along
// a head, head_lanes such rows take one head each and step through the heads. Each thread keeps its
// piece of the table row for all of its heads, so a group reads the row once.
//
// When tokens alone do not fill the GPU, `splits` groups share a token and its row is read that
// many times: at most once for each head_lanes heads, and exactly once from
// sm_count * kFullThreads / (unit_lanes * head_lanes) tokens on. Groups of one token are
// neighbours: they lie in at most ceil((splits - 1) / groups_per_block) + 1 blocks.
struct RotaryGeometry {
  int unit_lanes, head_lanes;
  int splits;
  int groups_per_block;
  int64_t groups;  // tokens * splits
  int block_threads;
  Grid grid;
};

constexpr int64_t kFullThreads = 2048;  // resident threads of one multiprocessor
constexpr int64_t kWantedBlocks = 4;    // a multiprocessor, before blocks grow beyond one group

// units: threads' worth of work in one head.
inline RotaryGeometry rotary_geometry(int64_t units, int64_t heads, int64_t tokens, int sm_count) {
  RotaryGeometry g;
  g.unit_lanes = static_cast<int>(std::min<int64_t>(units, kBlockThreads));
  const int64_t rows = std::max(kWarpThreads / g.unit_lanes, 1);
  g.head_lanes = static_cast<int>(std::min(rows, heads));
  const int lanes = g.unit_lanes * g.head_lanes;

  const int64_t most_splits = ceil_div(heads, g.head_lanes);
  const int64_t wanted = ceil_div(sm_count * kFullThreads, tokens * lanes);
  const int64_t passes = ceil_div(most_splits, std::min(wanted, most_splits));
  g.splits = static_cast<int>(ceil_div(most_splits, passes));

  g.groups = tokens * g.splits;
  const int64_t share = g.groups / (kWantedBlocks * sm_count);
  g.groups_per_block =
      static_cast<int>(std::clamp<int64_t>(share, 1, kBlockThreads / lanes));
  g.block_threads = whole_warps(g.groups_per_block * lanes);
  g.grid = grid_of(ceil_div(g.groups, g.groups_per_block));
  return g;
}

// rotary_table_grad. One block for each row of the gradient: unit_lanes threads lie along a head,
// head_lanes * token_lanes such rows (powers of two) share the heads and tokens that use the row.
// Depends on shapes alone, so the order of the sum does too.
struct TableGradGeometry {
  int unit_lanes, head_lanes, token_lanes;
  int block_threads;
  Grid grid;
};

inline int largest_power_of_two(int64_t limit) {
  int power = 1;
  while (2 * power <= limit) power *= 2;
  return power;
}

// tokens_per_row: about how many tokens use one row.
inline TableGradGeometry table_grad_geometry(int64_t units, int64_t heads, int64_t tokens_per_row,
                                             int64_t rows) {
  TableGradGeometry g;
  g.unit_lanes = static_cast<int>(std::min<int64_t>(units, kBlockThreads));
  const int64_t lanes = kBlockThreads / g.unit_lanes;
  // The most lanes that leave at most a fifth of them without a head in the last pass.
  g.head_lanes = largest_power_of_two(lanes);
  while (g.head_lanes > 1 && ceil_div(heads, g.head_lanes) * g.head_lanes * 4 > heads * 5) {
    g.head_lanes /= 2;
  }
  g.token_lanes =
      largest_power_of_two(std::min(lanes / g.head_lanes, std::max<int64_t>(tokens_per_row, 1)));
  g.block_threads = whole_warps(g.unit_lanes * g.head_lanes * g.token_lanes);
  g.grid = grid_of(rows);
  return g;
}

// Tables [rows, columns] with a thread for each entry: columns of one row side by side.
struct EntryGeometry {
  int column_lanes, rows_per_block;
  int block_threads;
  Grid grid;
};

inline EntryGeometry entry_geometry(int64_t columns, int64_t rows) {
  EntryGeometry g;
  g.column_lanes = static_cast<int>(std::min<int64_t>(columns, kBlockThreads));
  g.rows_per_block =
      static_cast<int>(std::min<int64_t>(kBlockThreads / g.column_lanes, rows));
  g.block_threads = whole_warps(g.column_lanes * g.rows_per_block);
  g.grid = grid_of(ceil_div(rows, g.rows_per_block));
  return g;
}

}  // namespace rope::cuda
