// rope_ext._C: what this build is, for people and for tests. The operators are registered, not
// bound (schema.cpp).
//
// The ROPE_EXT_* macros come from setup.py.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/capability.h"
#include "host/compiler.h"
#include "host/direct.h"
#include "registration.h"

namespace py = pybind11;

namespace {

std::string stable_abi_target() {
  constexpr unsigned long long target = TORCH_TARGET_VERSION;  // one byte each: major, minor, ...
  return std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
}

py::dict build_info() {
  py::dict info;
  info["version"] = ROPE_EXT_VERSION;
#ifdef ROPE_EXT_CUDA
  info["cuda"] = true;
  info["cuda_version"] = ROPE_EXT_CUDA_VERSION;
  info["cuda_archs"] = py::str(ROPE_EXT_CUDA_ARCHS).attr("split")();
  info["cudart"] = ROPE_EXT_CUDART;
  info["no_cuda_reason"] = py::none();
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
  info["cudart"] = py::none();
  info["no_cuda_reason"] = ROPE_EXT_NO_CUDA_REASON;
#endif
  info["cpu_capability"] = rope::cpu::capability();
  info["stable_abi_target"] = stable_abi_target();
  info["compiler"] = ROPE_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // A wrong ROPE_EXT_CPU_CAPABILITY is refused at import, not at the first call.
  rope::cpu::capability();
  m.def("register_operators", &rope::register_operators, py::arg("name"), py::arg("for_cuda"),
        "Makes the operators torch.ops.NAME.*; whether this call did. RuntimeError: taken.");
  m.def("build_info", &build_info,
        "What this build is: version, CUDA, CPU capability in use, stable-ABI target, compiler.");
  m.def("set_cpu_capability", &rope::cpu::set_capability, py::arg("name"),
        "Make the CPU kernels use the code for an instruction set, such as 'portable'. For tests.");
  rope::add_direct_calls(m);
}
