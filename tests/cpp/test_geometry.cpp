// How CUDA launches are cut into blocks, for shapes up to 2^40 elements: arithmetic alone, no GPU.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/parts/geometry.h"

using namespace rope::cuda;

namespace {

constexpr int64_t kSmCount = 132;  // H100
constexpr int64_t kMostElements = int64_t{1} << 40;

int failures = 0;
int64_t cases = 0;

#define EXPECT(condition, ...)                \
  do {                                        \
    if (!(condition)) {                       \
      if (++failures <= 20) {                 \
        std::printf("FAIL %s: ", #condition); \
        std::printf(__VA_ARGS__);             \
        std::printf("\n");                    \
      }                                       \
    }                                         \
  } while (false)

void check_limits(const Grid& grid, int64_t block_threads, const char* what) {
  EXPECT(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "%s: an empty grid", what);
  EXPECT(grid.x <= kMaxGridX && grid.y <= 65535 && grid.z <= 65535, "%s: %u x %u x %u", what,
         grid.x, grid.y, grid.z);
  EXPECT(block_threads >= 32 && block_threads <= 1024 && block_threads % 32 == 0,
         "%s: %lld threads", what, static_cast<long long>(block_threads));
}

// Every fragment of every head of every token has a thread, and no block is without a group.
void check_rotary(int64_t fragments, int64_t heads, int64_t batch, int64_t seq) {
  ++cases;
  const RotaryGeometry g = rotary_geometry(fragments, heads, batch, seq, kSmCount);
  const std::string shape = std::to_string(fragments) + " fragments, " + std::to_string(heads) +
                            " heads, " + std::to_string(batch) + " x " + std::to_string(seq);
  const char* const what = shape.c_str();
  check_limits(g.grid, g.block_threads, what);
  const int64_t lanes = int64_t{g.fragment_lanes} * g.head_lanes;
  EXPECT(int64_t{g.fragment_lanes} * g.fragment_chunks >= fragments, "%s: fragments left out",
         what);
  EXPECT(g.splits >= 1 && int64_t{g.splits} * g.head_lanes <= heads + g.head_lanes - 1,
         "%s: a group without a head", what);
  EXPECT(int64_t{g.parts} == int64_t{g.splits} * g.fragment_chunks, "%s: parts", what);
  EXPECT(int64_t{g.groups} == seq * g.parts, "%s: groups wrapped", what);
  EXPECT(int64_t{g.groups_per_block} * lanes <= g.block_threads, "%s: block too small", what);
  EXPECT(int64_t{g.grid.x} * g.groups_per_block >= g.groups, "%s: groups left out", what);
  EXPECT((int64_t{g.grid.x} - 1) * g.groups_per_block < g.groups, "%s: an idle block", what);
  EXPECT(int64_t{g.grid.y} * g.grid.z >= batch, "%s: sequences left out", what);
  // A token lies in few blocks: its groups are neighbours.
  const int64_t sharing = (g.parts - 1 + g.groups_per_block - 1) / g.groups_per_block + 1;
  EXPECT(sharing <= g.parts + 1, "%s: shared by %lld", what, static_cast<long long>(sharing));
}

void check_table_grad(int64_t fragments, int64_t heads, int64_t tokens_per_row, int64_t rows) {
  ++cases;
  const TableGradGeometry g = table_grad_geometry(fragments, heads, tokens_per_row, rows);
  check_limits(g.grid, g.block_threads, "table gradient");
  const int64_t workers = int64_t{g.head_lanes} * g.token_lanes;
  EXPECT(workers >= 1 && (workers & (workers - 1)) == 0, "workers %lld",
         static_cast<long long>(workers));
  EXPECT(g.fragment_lanes * workers <= g.block_threads && g.block_threads <= kBlockThreads,
         "threads");
  EXPECT(int64_t{g.grid.x} * g.grid.y >= rows, "rows left out");
}

void check_entries(int64_t columns, int64_t rows) {
  ++cases;
  const EntryGeometry g = entry_geometry(columns, rows);
  check_limits(g.grid, g.block_threads, "entries");
  EXPECT(int64_t{g.column_lanes} * g.rows_per_block <= g.block_threads, "threads");
  EXPECT(int64_t{g.grid.x} * g.grid.y * g.rows_per_block >= rows, "rows left out");
}

}  // namespace

int main() {
  std::vector<int64_t> sizes{3, 5, 7, 9, 31, 33, 127, 1000, 65535, (1 << 24) + 1};
  for (int shift = 0; shift <= 30; shift += 2) sizes.push_back(int64_t{1} << shift);
  for (const int64_t fragments :
       {1, 2, 5, 8, 12, 16, 31, 32, 33, 64, 255, 256, 257, 1000, 1 << 16}) {
    for (const int64_t heads : {1, 2, 3, 8, 12, 40, 71, 128, 4096}) {
      for (const int64_t batch : sizes) {
        for (const int64_t seq : sizes) {
          const double elements = static_cast<double>(fragments) * 16 * heads * batch * seq;
          if (elements > static_cast<double>(kMostElements) || seq > most_tokens(fragments))
            continue;
          check_rotary(fragments, heads, batch, seq);
        }
      }
      for (const int64_t rows : sizes) {
        for (const int64_t tokens : {0, 1, 4, 1 << 20})
          check_table_grad(fragments, heads, tokens, rows);
      }
    }
  }
  for (const int64_t columns : {1, 3, 12, 32, 64, 255, 256, 257, 5000}) {
    for (const int64_t rows : sizes) check_entries(columns, rows);
    check_entries(columns, kMostElements / columns);
  }

  // Llama-3-8B at decode batch 64: 8 lanes a head in bfloat16, 40 heads, one token a sequence,
  // which the kernel takes as one sequence of 64.
  const RotaryGeometry decode = rotary_geometry(8, 40, 1, 64, kSmCount);
  const int64_t blocks = int64_t{decode.grid.x} * decode.grid.y * decode.grid.z;
  EXPECT(blocks >= kSmCount, "decode: %lld blocks", static_cast<long long>(blocks));
  // With many tokens a row of the table has one reader.
  EXPECT(rotary_geometry(8, 40, 1, 1 << 20, kSmCount).parts == 1, "prefill shares rows");

  std::printf("%lld shapes, %d failures; decode batch 64: %lld blocks\n",
              static_cast<long long>(cases), failures, static_cast<long long>(blocks));
  return failures == 0 ? 0 : 1;
}
