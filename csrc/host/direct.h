// Direct calls: the operators as functions of Python that go past PyTorch's dispatcher.
#pragma once

namespace pybind11 {
class module_;
}

namespace rope {

// Adds them to the module.
void add_direct_calls(pybind11::module_& m);

}  // namespace rope
