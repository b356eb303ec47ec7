// Runs a model that AOTInductor has packaged, without Python: librope, which is linked, brings the
// operators.
//
//   run_package MODEL.pt2 MODEL.cases
//
// MODEL.cases is what torch.save made of [{"inputs": [...], "outputs": [...]}, ...] of tensors. The
// outputs have to have the same bits, and no library of Python may have been loaded.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<char> bytes_of(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "can't read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<at::Tensor> tensors_of(const c10::IValue& list) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& tensor : list.toListRef()) tensors.push_back(tensor.toTensor());
  return tensors;
}

// Whether the results of each case are right.
bool run(const char* package, const char* cases) {
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(package);
  const c10::IValue all = torch::jit::pickle_load(bytes_of(cases));
  bool right = !all.toListRef().empty();
  for (const c10::IValue& one : all.toListRef()) {
    const auto tensors = one.toGenericDict();
    const std::vector<at::Tensor> inputs = tensors_of(tensors.at("inputs"));
    const std::vector<at::Tensor> expected = tensors_of(tensors.at("outputs"));
    const std::vector<at::Tensor> got = model.run(inputs);
    bool equal = got.size() == expected.size();
    for (size_t i = 0; equal && i < got.size(); ++i) equal = at::equal(got[i], expected[i]);
    std::printf("%-4s batch %d, length %d\n", equal ? "ok" : "FAIL",
                static_cast<int>(inputs[0].size(0)), static_cast<int>(inputs[0].size(1)));
    right = right && equal;
  }
  return right;
}

// Whether this process has loaded none of Python's libraries, not even as a dependency.
bool without_python() {
  std::ifstream maps("/proc/self/maps");
  const std::string all{std::istreambuf_iterator<char>(maps), {}};
  bool without =
      all.find("librope.so") != std::string::npos;  // otherwise this looked in the wrong place
  for (const char* name : {"libpython", "libtorch_python"}) {
    without = without && all.find(name) == std::string::npos;
  }
  std::printf("%-4s no Python\n", without ? "ok" : "FAIL");
  return without;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_package MODEL.pt2 MODEL.cases\n");
    return 2;
  }
  try {
    const bool right = run(argv[1], argv[2]);
    return without_python() && right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
