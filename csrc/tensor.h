// A tensor of a call as operators see it, with everything read once: through the stable ABI each
// question is a call into libtorch, and the checks of a small rotation ask about a hundred.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace rope {

class Call;
using torch::headeronly::ScalarType;

// Stands for every dtype that PyTorch added after this was built. The first of them has the number
// of Undefined here, which was the last dtype.
inline constexpr auto kNewerDtype = static_cast<ScalarType>(-1);

// Valid for as long as its Tensor is.
class TensorView {
 public:
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  // What the call that the tensor belongs to has read; the device is one of PyTorch's numbers.
  struct Read {
    const void* data = nullptr;
    Sizes sizes;
    const int64_t* strides = nullptr;
    ScalarType dtype = ScalarType::Undefined;
    int32_t device_type = 0, device_index = -1;
  };

  const void* const_data_ptr() const { return read_.data; }
  void* mutable_data_ptr() const;  // for a tensor that the operator is going to write
  int64_t dim() const { return static_cast<int64_t>(read_.sizes.size()); }
  int64_t size(int64_t d) const { return read_.sizes[d]; }
  int64_t stride(int64_t d) const { return read_.strides[d]; }
  Sizes sizes() const { return read_.sizes; }
  Sizes strides() const { return Sizes(read_.strides, read_.sizes.size()); }
  ScalarType scalar_type() const { return read_.dtype; }
  bool is_none() const { return read_.dtype == ScalarType::Undefined; }
  bool is_cpu() const { return read_.device_type == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return read_.device_type == aoti_torch_device_type_cuda(); }
  bool on_device_of(const TensorView& other) const {
    return read_.device_type == other.read_.device_type &&
           read_.device_index == other.read_.device_index;
  }
  int32_t device_type() const { return read_.device_type; }
  int32_t get_device_index() const { return read_.device_index; }

  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : read_.sizes) n *= size;
    return n;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (size(d) != 1 && stride(d) != step) return numel() == 0;
      step *= size(d);
    }
    return true;
  }
  // Of the dtypes that some operator takes.
  int64_t element_size() const {
    switch (read_.dtype) {
      case ScalarType::Double:
      case ScalarType::Long: return 8;
      case ScalarType::Float:
      case ScalarType::Int: return 4;
      case ScalarType::Half:
      case ScalarType::BFloat16: return 2;
      default: return 1;  // float8
    }
  }

  Call& call() const { return *call_; }
  void* handle() const { return handle_; }

 protected:
  TensorView() = default;
  TensorView(Call& call, void* handle, const Read& read)
      : read_(read), call_(&call), handle_(handle) {}

  Read read_;
  Call* call_ = nullptr;
  void* handle_ = nullptr;  // what the call has the tensor by
};

// Owns what its call has the tensor by.
class Tensor : public TensorView {
 public:
  Tensor() = default;
  Tensor(Call& call, void* handle, const Read& read) : TensorView(call, handle, read) {}
  Tensor(Tensor&& other) noexcept : TensorView(other) { other.handle_ = nullptr; }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(static_cast<TensorView&>(*this), static_cast<TensorView&>(other));
    return *this;
  }
  ~Tensor();

  // The handle, for another owner.
  void* give_away() { return std::exchange(handle_, nullptr); }
};

using OptionalTensor = std::optional<Tensor>;

// A view of an argument that may be absent.
inline std::optional<TensorView> view(const OptionalTensor& t) {
  return t ? std::optional<TensorView>(*t) : std::nullopt;
}

}  // namespace rope
