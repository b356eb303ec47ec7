// A call by PyTorch's dispatcher: arguments and results are on its stack, tensors are handles of
// the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "call.h"

namespace rope {

class DispatcherCall final : public Call {
 public:
  // Owns the arguments on the stack, of which there are at most 64.
  explicit DispatcherCall(StableIValue* values, bool runs_kernel = true)
      : values_(values), runs_kernel_(runs_kernel) {}

  // Takes it for nobody, if nobody has taken it.
  template <class T>
  void drop(size_t i) {
    if (taken_ >> i & 1) return;
    try {
      Call::take<T>(i);
    } catch (...) {  // not a value of type T: it holds no handle
    }
  }

  void give(size_t i, Tensor result) override;
  Tensor empty_like(const TensorView& x) override;
  Tensor empty(const TensorView& x, TensorView::Sizes sizes,
               std::optional<ScalarType> dtype) override;
  Tensor transposed(Tensor x) override;
  Tensor contiguous(const TensorView& x) override;
  Tensor on_host(const TensorView& x) override;
  void fill_zero(const TensorView& x) override;
  void* written_data(const TensorView& x) override;
  void release(void* handle) noexcept override;
  bool runs_kernel() const override { return runs_kernel_; }
  void begin_kernel(bool) override {}
  void end_kernel() noexcept override {}

 private:
  using Call::take;
  void take(size_t i, Tensor& out, Dims) override;
  void take(size_t i, OptionalTensor& out, Dims) override;
  void take(size_t i, bool& out) override { out = value<bool>(i); }
  void take(size_t i, std::optional<bool>& out) override { out = value<std::optional<bool>>(i); }
  void take(size_t i, int64_t& out) override { out = value<int64_t>(i); }
  void take(size_t i, std::optional<int64_t>& out) override {
    out = value<std::optional<int64_t>>(i);
  }
  void take(size_t i, double& out) override { out = value<double>(i); }
  void take(size_t i, std::optional<ScalarType>& out) override {
    out = value<std::optional<ScalarType>>(i);
  }

  template <class T>
  T value(size_t i) {
    taken_ |= uint64_t{1} << i;
    return torch::stable::detail::to<T>(values_[i]);
  }
  Tensor own(AtenTensorHandle handle);

  StableIValue* values_;
  bool runs_kernel_;
  uint64_t taken_ = 0;  // a bit for each argument
};

}  // namespace rope
