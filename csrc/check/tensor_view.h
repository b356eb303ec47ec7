// A tensor as the checks see it, with everything read once: through the stable ABI each question is
// a call into libtorch, and the checks of a small rotation ask about a hundred.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <optional>

namespace rope {

// Stands for every dtype that PyTorch added after this was built. The first of them has the number
// of Undefined here, which was the last dtype.
inline constexpr auto kNewerDtype = static_cast<torch::headeronly::ScalarType>(-1);

class TensorView {
 public:
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  // Valid for as long as t is. PyTorch passes None as an undefined tensor. Here that has no
  // dimensions and is on the CPU, so that the check of its dtype or shape refuses it.
  TensorView(const torch::stable::Tensor& t) : tensor_(&t), dtype_(dtype_of(t)) {
    if (is_none()) {
      device_type_ = aoti_torch_device_type_cpu();
      return;
    }
    data_ = t.const_data_ptr();
    sizes_ = t.sizes();
    device_index_ = t.get_device_index();
    int64_t* strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    strides_ = strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type_));
  }

  const torch::stable::Tensor& tensor() const { return *tensor_; }
  const void* const_data_ptr() const { return data_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  Sizes sizes() const { return sizes_; }
  Sizes strides() const { return Sizes(strides_, sizes_.size()); }
  torch::headeronly::ScalarType scalar_type() const { return dtype_; }
  bool is_none() const { return dtype_ == torch::headeronly::ScalarType::Undefined; }
  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  bool on_device_of(const TensorView& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }
  bool is_contiguous() const { return tensor_->is_contiguous(); }
  int32_t get_device_index() const { return device_index_; }

  int64_t element_size() const { return static_cast<int64_t>(tensor_->element_size()); }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes_) n *= size;
    return n;
  }

 private:
  // scalar_type() throws for dtypes that the stable ABI does not name. They are read by number, and
  // every check refuses them.
  static torch::headeronly::ScalarType dtype_of(const torch::stable::Tensor& t) {
    using torch::headeronly::ScalarType;
    if (!t.defined()) return ScalarType::Undefined;
    try {
      return t.scalar_type();
    } catch (const std::exception&) {
      int32_t number;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
      const auto dtype = static_cast<ScalarType>(number);
      return dtype < ScalarType::Undefined ? dtype : kNewerDtype;
    }
  }

  const torch::stable::Tensor* tensor_;
  const void* data_ = nullptr;
  Sizes sizes_;
  const int64_t* strides_ = nullptr;
  torch::headeronly::ScalarType dtype_;
  int32_t device_index_ = -1, device_type_;
};

// A view of an argument that may be absent.
inline std::optional<TensorView> view(const std::optional<torch::stable::Tensor>& t) {
  return t ? std::optional<TensorView>(*t) : std::nullopt;
}

}  // namespace rope
