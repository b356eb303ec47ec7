// Runs a kernel on the device of a tensor.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <tuple>

#include "call.h"
#include "check/refusal.h"
#include "kernels.h"
#include "tensor.h"

// In libtorch_cuda, which is never linked: found when the running PyTorch has CUDA, else null.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rope {

// Refuses a device that this build has no kernels for.
inline void check_device_supported(const char* op, const TensorView& t) {
  if (t.is_cpu() || !t.call().runs_kernel()) return;
  if constexpr (!kBuiltWithCuda) {
    throw std::runtime_error(text("rope::", op, ": built without CUDA: ", ROPE_EXT_NO_CUDA_REASON));
  }
  if (!t.is_cuda() || aoti_torch_get_current_cuda_stream == nullptr) {
    refuse(op, "a CPU or CUDA tensor", device_text(t));
  }
}

// A kernel that reads or writes more elements than this takes long.
inline constexpr int64_t kShortWork = 1 << 16;

// Tells the call of a tensor that a kernel runs.
class Running {
 public:
  Running(const TensorView& of, bool is_long) : call_(of.call()) { call_.begin_kernel(is_long); }
  Running(const Running&) = delete;
  ~Running() { call_.end_kernel(); }

 private:
  Call& call_;
};

// Runs the kernel for these arguments on the device of `of`, which is supported and as large as any
// tensor of the call; on CUDA with that device current, on its current stream, where a launch may
// have to wait.
template <class Args>
void run(const TensorView& of, const Args& args) {
  if (!of.call().runs_kernel()) return;
  const Running running(of, !of.is_cpu() || of.numel() > kShortWork);
  if (of.is_cpu()) return std::get<void (*)(const Args&)>(cpu::kKernels)(args);
  if constexpr (kBuiltWithCuda) {
    const int32_t index = of.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    std::get<void (*)(const Args&, void*)>(cuda::kKernels)(args, stream);
  }
}

}  // namespace rope
