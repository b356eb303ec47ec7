// Runs a kernel on the device of a tensor.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "check/refusal.h"
#include "check/tensor_view.h"
#include "kernels.h"

// Of libtorch_cuda, which is never linked: bound when the running PyTorch has CUDA, else null.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rope {

#if defined(ROPE_EXT_CUDA)
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

// Refuses a device that this build has no kernels for.
inline void check_device_supported(const char* op, const TensorView& t) {
  if (t.is_cpu()) return;
  if constexpr (!kBuiltWithCuda) {
    throw std::runtime_error(text("rope::", op, ": built without CUDA: ", ROPE_EXT_NO_CUDA_REASON));
  }
  if (!t.is_cuda() || aoti_torch_get_current_cuda_stream == nullptr) {
    refuse(op, "a CPU or CUDA tensor", device_text(t));
  }
}

// The kernel for the tensor's device: on CUDA with that device current, on its current stream.
template <class Args>
void run(const TensorView& where, const Args& args, void (*on_cpu)(const Args&),
         void (*on_cuda)(const Args&, void* stream)) {
  if (where.is_cpu()) return on_cpu(args);
  const int32_t index = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  on_cuda(args, stream);
}

}  // namespace rope
