// A call of an operator: where its arguments come from, where its results go, and what it asks of
// PyTorch on the way. Those by the dispatcher are in host/dispatcher_call.h, those by Python in
// host/direct.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "tensor.h"

namespace rope {

// The dimensions of a tensor that the functions of Python take in several orders.
enum class Dims { AsInSchema, OfTokens, OfCache };

// x, q, k or v; a cache with heads. They come with their dimensions as in the schema.
struct TokenTensor : Tensor {};
struct OptionalTokenTensor : OptionalTensor {};
struct CacheTensor : Tensor {};

class Call {
 public:
  // Argument i of the schema, once.
  template <class T>
  T take(size_t i) {
    T out{};
    if constexpr (std::is_same_v<T, TokenTensor>) {
      take(i, out, Dims::OfTokens);
    } else if constexpr (std::is_same_v<T, OptionalTokenTensor>) {
      take(i, out, Dims::OfTokens);
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      take(i, out, Dims::AsInSchema);
    } else if constexpr (std::is_same_v<T, CacheTensor>) {
      take(i, out, Dims::OfCache);
    } else if constexpr (std::is_same_v<T, Tensor>) {
      take(i, out, Dims::AsInSchema);
    } else {
      take(i, out);
    }
    return out;
  }
  virtual void give(size_t i, Tensor result) = 0;

  // A new tensor as torch.empty_like makes it; of these sizes, like x.new_empty.
  virtual Tensor empty_like(const TensorView& x) = 0;
  virtual Tensor empty(const TensorView& x, TensorView::Sizes sizes,
                       std::optional<ScalarType> dtype) = 0;
  // A view of x with its first two dimensions swapped.
  virtual Tensor transposed(Tensor x) = 0;
  virtual Tensor contiguous(const TensorView& x) = 0;
  virtual Tensor on_host(const TensorView& x) = 0;
  virtual void fill_zero(const TensorView& x) = 0;

  // The memory of x, which the kernel of this call is going to write.
  virtual void* written_data(const TensorView& x) = 0;
  virtual void release(void* handle) noexcept = 0;

  // Whether the operator runs a kernel. If not, it only checks its arguments and makes its results,
  // which rope_ext/_engine/fallback.py computes.
  virtual bool runs_kernel() const { return true; }

  // Around the kernel, which may take long.
  virtual void begin_kernel(bool is_long) = 0;
  virtual void end_kernel() noexcept = 0;

 protected:
  ~Call() = default;

  virtual void take(size_t i, Tensor& out, Dims dims) = 0;
  virtual void take(size_t i, OptionalTensor& out, Dims dims) = 0;
  virtual void take(size_t i, bool& out) = 0;
  virtual void take(size_t i, std::optional<bool>& out) = 0;
  virtual void take(size_t i, int64_t& out) = 0;
  virtual void take(size_t i, std::optional<int64_t>& out) = 0;
  virtual void take(size_t i, double& out) = 0;
  virtual void take(size_t i, std::optional<ScalarType>& out) = 0;
};

inline void* TensorView::mutable_data_ptr() const { return call_->written_data(*this); }
inline Tensor::~Tensor() {
  if (handle_ != nullptr) call_->release(handle_);
}

}  // namespace rope
