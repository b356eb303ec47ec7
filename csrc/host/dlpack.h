// The parts of the DLPack specification, version 1, with which a C function reads the tensors of
// Python: https://dmlc.github.io/dlpack
#pragma once

#include <cstdint>

namespace rope::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kFloat8E4M3 = 10, kFloat8E5M2 = 12 };

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

// What the attribute __dlpack_c_exchange_api__ of a type of tensors holds.
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  void (*allocate)();
  void (*managed_from_object)();
  void (*object_from_managed)();
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; 0, or an error of Python is set
  void (*current_stream)();
};

}  // namespace rope::dlpack
