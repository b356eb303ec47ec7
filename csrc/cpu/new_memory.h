// Memory that the operating system has yet to give: its pages come one by one, at the first touch
// of each, and for a large result that takes longer than the rotation.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rope::cpu {

// Asks for huge pages for a result that is about to be written whole, as torch's allocator does
// under THP_MEM_ALLOC_ENABLE: one fault for 512 pages. It is an advice: where the system doesn't
// grant it, or the memory is in use already, nothing changes.
inline void expect_whole_write(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthwhile = int64_t{4} << 20;  // two huge pages; smaller blocks are reused
  if (bytes < kWorthwhile) return;
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = (reinterpret_cast<int64_t>(data) + page - 1) / page * page;
  const int64_t end = (reinterpret_cast<int64_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace rope::cpu
