// The messages of errors of launches.
#include "cuda/parts/launch_errors.h"

#include <stdexcept>
#include <string>

namespace rope::cuda {

void throw_cuda_error(const char* op, const char* message) {
  throw std::runtime_error(std::string("rope::") + op + ": CUDA error: " + message);
}

void throw_too_large(const char* op, int64_t heads, int64_t head_dim, int64_t batch, int64_t seq) {
  throw std::runtime_error(std::string("rope::") + op +
                           ": on CUDA expected at most 2^30 heads and channels, and a batch and "
                           "sequence below 2^32, got " +
                           std::to_string(heads) + " heads of " + std::to_string(head_dim) +
                           " channels, batch " + std::to_string(batch) + ", sequence " +
                           std::to_string(seq));
}

void throw_too_many_rows(const char* op, int64_t heads, int64_t batch, int64_t seq) {
  throw std::runtime_error(std::string("rope::") + op +
                           ": on CUDA expected less than 2^32 heads of all tokens, got batch " +
                           std::to_string(batch) + ", sequence " + std::to_string(seq) + " and " +
                           std::to_string(heads) + " heads of a token");
}

}  // namespace rope::cuda
