// Errors of launches. They are made in a file that nvcc does not compile: the standard library's
// headers for them cost nvcc time for each architecture.
#pragma once

#include <cstdint>

namespace rope::cuda {

[[noreturn]] void throw_cuda_error(const char* op, const char* message);
[[noreturn]] void throw_too_large(const char* op, int64_t heads, int64_t head_dim, int64_t batch,
                                  int64_t seq);
[[noreturn]] void throw_too_many_rows(const char* op, int64_t heads, int64_t batch, int64_t seq);

}  // namespace rope::cuda
