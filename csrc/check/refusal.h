// The errors of the operators, and the text of shapes, dtypes and devices in them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "args.h"
#include "tensor.h"

namespace rope {

// Strings and integers, one after the other. Not by a stream: some builds of PyTorch bring a second
// libstdc++ into the process, and a stream made of parts of both crashes.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  const auto append = [&out](const auto& part) {
    if constexpr (std::is_integral_v<std::decay_t<decltype(part)>>) {
      out += std::to_string(part);
    } else {
      out += part;
    }
  };
  (append(parts), ...);
  return out;
}

inline std::string shape_text(TensorView::Sizes sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += text(i == 0 ? "" : ", ", sizes[i]);
  return out + "]";
}

inline std::string shape_text(const TensorView& t) {
  return t.is_none() ? "None" : shape_text(t.sizes());
}

// Its name in Python, which is mostly that of C++ in lower case.
inline std::string dtype_text(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  if (type == kNewerDtype) return "a dtype that this build does not know";
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Undefined: return "None";
    default: break;
  }
  std::string name = torch::headeronly::toString(type);
  for (char& letter : name) {
    if ('A' <= letter && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  }
  return name;
}

inline std::string device_text(const TensorView& t) {
  if (t.is_none()) return "None";
  const auto name = [](int32_t type) {
    using torch::headeronly::DeviceType;
    switch (static_cast<DeviceType>(type)) {
      case DeviceType::CPU: return "cpu";
      case DeviceType::CUDA: return "cuda";
      case DeviceType::HPU: return "hpu";
      case DeviceType::Meta: return "meta";
      case DeviceType::MPS: return "mps";
      case DeviceType::MTIA: return "mtia";
      case DeviceType::PrivateUse1: return "privateuseone";
      case DeviceType::XPU: return "xpu";
      default: return "another device";
    }
  }(t.device_type());
  const int64_t index = t.is_cpu() ? -1 : t.get_device_index();
  return index < 0 ? name : text(name, ":", index);
}

// rope::apply_rotary_qk: expected cos to have shape [L, 64], got [128, 32]
// advice: what to do, where the mistake is a known one; else empty.
[[noreturn]] inline void refuse(const char* op, const std::string& expected, const std::string& got,
                                const std::string& advice = "") {
  throw std::runtime_error(text("rope::", op, ": expected ", expected, ", got ", got,
                                advice.empty() ? "" : ": ", advice));
}

}  // namespace rope
