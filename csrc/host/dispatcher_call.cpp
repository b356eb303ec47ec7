#include "host/dispatcher_call.h"

#include <torch/csrc/stable/ops.h>

#include <exception>

#include "host/allocation.h"

namespace rope {

namespace {

AtenTensorHandle handle_of(const TensorView& x) {
  return static_cast<AtenTensorHandle>(x.handle());
}

// The conversion of the stable ABI throws for dtypes that it does not name. They are read by
// number, and every check refuses them.
ScalarType dtype_of(AtenTensorHandle handle) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &number));
  try {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(number));
  } catch (const std::exception&) {
    const auto dtype = static_cast<ScalarType>(number);
    return dtype < ScalarType::Undefined ? dtype : kNewerDtype;
  }
}

// PyTorch passes None as an undefined tensor. Here that has no dimensions and is on the CPU, so
// that the check of its dtype or shape refuses it.
TensorView::Read read(AtenTensorHandle handle) {
  TensorView::Read out;
  out.device_type = aoti_torch_device_type_cpu();
  bool defined;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined));
  if (!defined) return out;
  int64_t dims, *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &out.data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &out.device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &out.device_type));
  out.sizes = TensorView::Sizes(sizes, static_cast<size_t>(dims));
  out.strides = strides;
  out.dtype = dtype_of(handle);
  return out;
}

}  // namespace

Tensor DispatcherCall::own(AtenTensorHandle handle) {
  Tensor out(*this, handle, {});  // so that an exception of read releases the handle
  const TensorView::Read its = read(handle);
  return Tensor(*this, out.give_away(), its);
}

void DispatcherCall::take(size_t i, Tensor& out, Dims) { out = own(value<AtenTensorHandle>(i)); }

void DispatcherCall::take(size_t i, OptionalTensor& out, Dims) {
  const auto handle = value<std::optional<AtenTensorHandle>>(i);
  if (handle) out.emplace(own(*handle));
}

void DispatcherCall::give(size_t i, Tensor result) {
  values_[i] = torch::stable::detail::from(static_cast<AtenTensorHandle>(result.give_away()));
}

Tensor DispatcherCall::empty_like(const TensorView& x) { return own(allocate_like(handle_of(x))); }

Tensor DispatcherCall::empty(const TensorView& x, TensorView::Sizes sizes,
                             std::optional<ScalarType> dtype) {
  return own(allocate(handle_of(x), sizes, dtype));
}

Tensor DispatcherCall::transposed(Tensor x) {
  const torch::stable::Tensor view =
      torch::stable::transpose(torch::stable::Tensor(new_handle(handle_of(x))), 0, 1);
  return own(new_handle(view.get()));
}

Tensor DispatcherCall::contiguous(const TensorView& x) {
  return own(allocate_contiguous(handle_of(x)));
}

Tensor DispatcherCall::on_host(const TensorView& x) {
  const torch::stable::Tensor on_host =
      torch::stable::to(torch::stable::Tensor(new_handle(handle_of(x))),
                        torch::stable::Device(torch::headeronly::DeviceType::CPU));
  return own(new_handle(on_host.get()));
}

void DispatcherCall::fill_zero(const TensorView& x) {
  torch::stable::Tensor stable(new_handle(handle_of(x)));
  torch::stable::zero_(stable);
}

void* DispatcherCall::written_data(const TensorView& x) {
  void* data;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_of(x), &data));
  return data;
}

void DispatcherCall::release(void* handle) noexcept {
  aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle));
}

}  // namespace rope
