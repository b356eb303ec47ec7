// Launching a kernel, with its error check.
#pragma once

#include <cuda_runtime.h>

#include "cuda/parts/geometry.h"
#include "cuda/parts/launch_errors.h"

namespace rope::cuda {

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw_cuda_error(op, cudaGetErrorString(error));
}

// The error is that of the launch itself. An error inside the kernel shows at a later call.
template <class... Args>
void launch_with(size_t shared_bytes, const char* op, void (*kernel)(Args...), Grid grid,
                 uint32_t block_threads, void* stream, const Args&... args) {
  kernel<<<dim3(grid.x, grid.y, grid.z), block_threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), op);
}

template <class... Args>
void launch(const char* op, void (*kernel)(Args...), Grid grid, uint32_t block_threads,
            void* stream, const Args&... args) {
  launch_with(0, op, kernel, grid, block_threads, stream, args...);
}

// Kernels count heads, the channels of a head, sequences and tokens of a sequence in 32 bits.
inline void check_counts(const char* op, int64_t heads, int64_t head_dim, int64_t batch,
                         int64_t seq) {
  constexpr int64_t kMost = int64_t{1} << 30, kMostRows = int64_t{0xffffffff};
  if (heads <= kMost && head_dim <= kMost && batch <= kMostRows && seq <= kMostRows) return;
  throw_too_large(op, heads, head_dim, batch, seq);
}

// Multiprocessors of the current device.
inline int sm_count(const char* op) {
  int device, count;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op);
  return count;
}

// Blocks of kBlockThreads that a multiprocessor should hold at a time, with so many threads
// together: it bounds the registers of a thread. Turing holds 1024 threads at most.
constexpr int resident_blocks(int threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return (threads < 1024 ? threads : 1024) / kBlockThreads;
#else
  return threads / kBlockThreads;
#endif
}

__device__ __forceinline__ int64_t block_index() {
  return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
}

}  // namespace rope::cuda
