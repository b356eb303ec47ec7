// The stable ABI reports that a call has failed, but not why. Programs that retry with less, such
// as accelerate's find_executable_batch_size, look for torch.OutOfMemoryError and for PyTorch's
// message. So after a failed allocation the same memory is requested once more from a C++ function
// of libtorch, whose exception reaches the caller.
#include "host/allocation.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

// Since PyTorch 2.13, else null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rope {

using torch::headeronly::ScalarType;
using torch::stable::detail::from;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// at::Tensor: one pointer, with a destructor.
struct NewTensor {
  ~NewTensor() {}
  void* impl;
};

// c10::Device
struct TypeAndIndex {
  int8_t type, index;
};

// at::_ops::new_empty::call. It is not part of the stable ABI: the loader looks up its name, which
// holds the types of its parameters, and leaves it null in a PyTorch without it. A size as SymInt
// is the number itself. On macOS std::optional is that of libc++, and names begin with another
// underscore.
using NewEmpty = NewTensor(const void* like, Sizes sizes, std::optional<ScalarType> dtype,
                           std::optional<int8_t> layout, std::optional<TypeAndIndex> device,
                           std::optional<bool> pin_memory);
__attribute__((weak)) NewEmpty torch_new_empty __asm__(
#ifdef __APPLE__
    "__ZN2at4_ops9new_empty4callERKNS_6TensorEN3c108ArrayRefINS5_6SymIntEEENSt3__18optionalINS5_"
    "10ScalarTypeEEENSA_INS5_6LayoutEEENSA_INS5_6DeviceEEENSA_IbEE");
#else
    "_ZN2at4_ops9new_empty4callERKNS_6TensorEN3c108ArrayRefINS5_6SymIntEEESt8optionalINS5_"
    "10ScalarTypeEES9_INS5_6LayoutEES9_INS5_6DeviceEES9_IbE");
#endif

namespace {

// Throws PyTorch's own exception if it can't allocate such a tensor; returns if by now it can.
void throw_as_torch(AtenTensorHandle like, Sizes sizes, std::optional<ScalarType> dtype) {
  if (torch_new_empty != nullptr) {
    auto* const made = new NewTensor(
        torch_new_empty(like, sizes, dtype, std::nullopt, std::nullopt, std::nullopt));
    aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(made));
  } else if (torch_exception_get_what_without_backtrace != nullptr) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

Sizes sizes_of(AtenTensorHandle x) {
  int64_t dims, *sizes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(x, &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes));
  return Sizes(sizes, static_cast<size_t>(dims));
}

// The result of aten::`name` for x and the arguments that rest() returns: a tensor of these sizes
// and dtype.
template <class Rest>
AtenTensorHandle call(const char* name, AtenTensorHandle x, const Rest& rest, Sizes sizes,
                      std::optional<ScalarType> dtype = std::nullopt) {
  const auto stack = [&] {  // the call owns its values
    std::array<StableIValue, 6> values{torch::stable::detail::from(new_handle(x))};
    const auto others = rest();
    std::copy(others.begin(), others.end(), values.begin() + 1);
    return values;
  };
  auto values = stack();
  if (torch_call_dispatcher(name, "", values.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw_as_torch(x, sizes, dtype);
    values = stack();
    if (torch_call_dispatcher(name, "", values.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
      const auto what = torch_exception_get_what_without_backtrace;
      throw std::runtime_error(what ? what() : std::string(name) + " of PyTorch failed");
    }
  }
  return torch::stable::detail::to<AtenTensorHandle>(values[0]);
}

}  // namespace

AtenTensorHandle new_handle(AtenTensorHandle x) {
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x, &out));
  return out;
}

AtenTensorHandle allocate_like(AtenTensorHandle x) {
  const auto rest = [] {
    const StableIValue none = from(std::nullopt);
    return std::array{none, none, none, none, none};
  };
  return call("aten::empty_like", x, rest, sizes_of(x));
}

AtenTensorHandle allocate(AtenTensorHandle like, Sizes sizes, std::optional<ScalarType> dtype) {
  const auto rest = [&] {
    const StableIValue none = from(std::nullopt);
    return std::array{from(sizes), from(dtype), none, none, none};
  };
  return call("aten::new_empty", like, rest, sizes, dtype);
}

AtenTensorHandle allocate_contiguous(AtenTensorHandle x) {
  const auto rest = [] { return std::array{from(torch::headeronly::MemoryFormat::Contiguous)}; };
  return call("aten::contiguous", x, rest, sizes_of(x));
}

}  // namespace rope
