// A tensor as the checks see it, with everything read once: through the stable ABI each question is
// a call into libtorch, and the checks of one small rotation ask a hundred.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace rope {

class TensorView {
 public:
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  // Valid for as long as t is.
  TensorView(const torch::stable::Tensor& t)
      : tensor_(&t),
        data_(t.const_data_ptr()),
        sizes_(t.sizes()),
        dtype_(t.scalar_type()),
        device_index_(t.get_device_index()) {
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
  const torch::stable::Tensor* tensor_;
  const void* data_;
  Sizes sizes_;
  const int64_t* strides_;
  torch::headeronly::ScalarType dtype_;
  int32_t device_index_, device_type_;
};

}  // namespace rope
