// The dispatcher, and the kernels that are written in Python, take most of the time of a small
// call. A direct call reads its tensors through the DLPack exchange API of their type, and runs the
// same C++ function. It returns NotImplemented, before it has written anything, where the
// dispatcher is needed: to differentiate, for modes, transforms and tensors that are more than
// memory, and for whatever a check refuses, so that the errors are those of the dispatcher's call.
#include "host/direct.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <deque>
#include <exception>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "host/dlpack.h"
#include "registration.h"

namespace py = pybind11;

namespace rope {

namespace {

// An order of dimensions that the functions of Python take, by its name.
struct Order {
  PyObject* name;
  int64_t rank;
  bool swaps;
  int64_t first, second;  // the dimensions to swap to get those of the schema
};

// A function of PyTorch without arguments, or a method or an attribute of its tensors. Those that
// are written in C are called without Python's layers between, which take longer than they do.
class Question {
 public:
  Question() = default;
  explicit Question(PyObject* callable) : callable_(callable) {
    if (PyCFunction_CheckExact(callable) && PyCFunction_GET_FLAGS(callable) == METH_NOARGS) {
      function_ = PyCFunction_GET_FUNCTION(callable);
      self_ = PyCFunction_GET_SELF(callable);
    } else if (Py_TYPE(callable) == &PyMethodDescr_Type) {
      const PyMethodDef& method = *reinterpret_cast<PyMethodDescrObject*>(callable)->d_method;
      if (method.ml_flags == METH_NOARGS) function_ = method.ml_meth;
    } else if (Py_TYPE(callable) == &PyGetSetDescr_Type) {
      attribute_ = reinterpret_cast<PyGetSetDescrObject*>(callable)->d_getset;
    }
  }

  // A new reference to the answer, or nullptr and an error of Python. tensor: of a method or
  // attribute.
  PyObject* operator()(PyObject* tensor = nullptr) const {
    if (attribute_ != nullptr) return attribute_->get(tensor, attribute_->closure);
    if (function_ != nullptr) return function_(tensor != nullptr ? tensor : self_, nullptr);
    return tensor != nullptr ? PyObject_CallOneArg(callable_, tensor)
                             : PyObject_CallNoArgs(callable_);
  }

 private:
  PyObject *callable_ = nullptr, *self_ = nullptr;
  PyCFunction function_ = nullptr;
  PyGetSetDef* attribute_ = nullptr;
};

// What direct calls need of PyTorch, set once; rope_ext/_engine/direct.py says what it is.
struct PyTorch {
  const dlpack::ExchangeApi* api = nullptr;
  PyTypeObject *tensor, *parameter;
  std::array<PyObject*, 4> dtypes;  // of DType
  std::vector<Question> unless;
  Question is_negative, is_inference_mode, requires_grad, version;
  PyObject *forward_ad, *forward_level;  // a module's dictionary, and a name in it
  PyObject *increment_version, *empty_like, *new_empty_strided, *transpose;
  std::vector<Order> layouts, cache_layouts;
};
PyTorch pytorch;
bool in_use = false;

constexpr ScalarType kDTypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::Half,
                                  ScalarType::BFloat16};

// The dispatcher is needed.
struct NotDirect : std::exception {};

// A new reference, or an exception where Python has set an error, which the dispatcher will raise.
PyObject* checked(PyObject* object) {
  if (object != nullptr) return object;
  PyErr_Clear();
  throw NotDirect();
}

bool is_true(PyObject* result) {
  const int truth = PyObject_IsTrue(checked(result));
  Py_DECREF(result);
  return truth != 0;
}

bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == pytorch.tensor || Py_TYPE(object) == pytorch.parameter;
}

bool is_plain(PyObject* object) {
  return object == Py_None || PyBool_Check(object) || PyLong_CheckExact(object) ||
         PyFloat_CheckExact(object) || Py_TYPE(object) == Py_TYPE(pytorch.dtypes[0]);
}

int64_t integer(PyObject* object) {
  int overflow = 0;
  if (!PyLong_CheckExact(object)) throw NotDirect();
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0) throw NotDirect();
  return value;
}

// Whether the call is one that the operators' C++ functions can take without the dispatcher.
bool can_be_direct(PyObject* const* args, size_t count) {
  if (!in_use) return false;
  const bool differentiates = aoti_torch_grad_mode_is_enabled();
  for (size_t i = 0; i < count; ++i) {
    if (is_tensor(args[i])) {
      if (differentiates && is_true(pytorch.requires_grad(args[i]))) return false;
    } else if (!is_plain(args[i])) {
      return false;
    }
  }
  for (const Question& condition : pytorch.unless) {
    if (is_true(condition())) return false;
  }
  PyObject* const level = PyDict_GetItemWithError(pytorch.forward_ad, pytorch.forward_level);
  if (level == nullptr || PyLong_AsLong(level) >= 0) return false;
  return std::none_of(args, args + count, [](PyObject* each) {
    return is_tensor(each) && is_true(pytorch.is_negative(each));
  });
}

ScalarType scalar_type(const dlpack::DataType& type) {
  const auto is = [&](uint8_t code, int bits) { return type.code == code && type.bits == bits; };
  if (type.lanes != 1) throw NotDirect();
  if (is(dlpack::kBfloat, 16)) return ScalarType::BFloat16;
  if (is(dlpack::kFloat, 32)) return ScalarType::Float;
  if (is(dlpack::kFloat, 16)) return ScalarType::Half;
  if (is(dlpack::kFloat, 64)) return ScalarType::Double;
  if (is(dlpack::kInt, 64)) return ScalarType::Long;
  if (is(dlpack::kInt, 32)) return ScalarType::Int;
  if (is(dlpack::kFloat8E4M3, 8)) return ScalarType::Float8_e4m3fn;
  if (is(dlpack::kFloat8E5M2, 8)) return ScalarType::Float8_e5m2;
  throw NotDirect();  // no operator takes it
}

// Whether the elements fill their memory, in any order of the dimensions.
bool is_dense(const TensorView& x) {
  int64_t step = 1, left = 0;
  for (const int64_t size : x.sizes()) left += size != 1;
  while (left > 0) {
    int64_t d = 0;
    while (d < x.dim() && (x.size(d) == 1 || x.stride(d) != step)) ++d;
    if (d == x.dim() || x.size(d) == 0) return false;
    step *= x.size(d);
    --left;
  }
  return true;
}

class DirectCall final : public Call {
 public:
  // head_dim: of each x, q, k and v; -1: any.
  DirectCall(PyObject* const* args, const Order* of_tokens, const Order* of_caches,
             int64_t head_dim)
      : args_(args), of_tokens_(of_tokens), of_caches_(of_caches), head_dim_(head_dim) {}
  ~DirectCall() {
    for (PyObject* const result : results_) Py_XDECREF(result);
  }

  bool has_begun() const { return has_begun_; }

  // A new reference to the results of an operator that has so many.
  PyObject* results(size_t count) {
    if (count == 0) return Py_NewRef(Py_None);
    if (count == 1) return std::exchange(results_[0], nullptr);
    PyObject* const all = PyTuple_New(static_cast<Py_ssize_t>(count));
    for (size_t i = 0; all != nullptr && i < count; ++i) {
      PyTuple_SET_ITEM(all, i, std::exchange(results_[i], nullptr));
    }
    return all;
  }

  void give(size_t i, Tensor result) override {
    results_.at(i) = static_cast<PyObject*>(result.give_away());
  }

  // Where the order of equal strides would decide, the result is made as the dispatcher makes it,
  // in the order of the schema.
  Tensor empty_like(const TensorView& x) override {
    const Order* const order = order_of(x);
    if (order == nullptr || is_dense(x)) {
      return made(PyObject_CallOneArg(pytorch.empty_like, object_of(x)), order);
    }
    PyObject* const view = transposed(Py_NewRef(object_of(x)), *order);
    PyObject* const like = PyObject_CallOneArg(pytorch.empty_like, view);
    Py_DECREF(view);
    return made(transposed(checked(like), *order), order);
  }

  Tensor empty(const TensorView& x, TensorView::Sizes sizes,
               std::optional<ScalarType> dtype) override {
    const Order* const order = order_of(x);
    PyObject* of = Py_None;
    for (size_t i = 0; i < 4; ++i) {
      if (dtype == kDTypes[i]) of = pytorch.dtypes[i];
    }
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(sizes[d], 1))
      strides[d] = step;
    // PyTorch takes strides, and no dtype, in less time than it takes to find them.
    static PyObject* const names = Py_BuildValue("(s)", "dtype");
    PyObject* const args[] = {object_of(x), tuple_of(sizes), tuple_of(strides), of};
    const bool same = !dtype || *dtype == x.scalar_type();
    PyObject* const like =
        PyObject_Vectorcall(pytorch.new_empty_strided, args, 3, same ? nullptr : names);
    Py_DECREF(args[1]);
    Py_DECREF(args[2]);
    return made(order == nullptr ? like : transposed(checked(like), *order), order);
  }

  Tensor contiguous(const TensorView&) override { throw NotDirect(); }
  Tensor on_host(const TensorView&) override { throw NotDirect(); }
  void fill_zero(const TensorView&) override { throw NotDirect(); }

  void* written_data(const TensorView& x) override {
    PyObject* const object = object_of(x);
    const auto among = [object](const auto& objects, size_t count) {
      return std::find(objects.begin(), objects.begin() + count, object) != objects.begin() + count;
    };
    if (!among(made_, made_count_) && !among(written_, written_count_)) {
      written_.at(written_count_++) = object;
    }
    return const_cast<void*>(x.const_data_ptr());
  }

  void release(void* handle) noexcept override { Py_DECREF(static_cast<PyObject*>(handle)); }

  void begin_kernel(bool is_long) override {
    count_versions();
    has_begun_ = true;
    if (is_long) thread_ = PyEval_SaveThread();
  }
  void end_kernel() noexcept override {
    if (thread_ != nullptr) PyEval_RestoreThread(thread_);
    thread_ = nullptr;
  }

 private:
  static PyObject* object_of(const TensorView& x) { return static_cast<PyObject*>(x.handle()); }

  // A new reference.
  static PyObject* tuple_of(TensorView::Sizes values) {
    PyObject* const all = checked(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
    for (size_t i = 0; i < values.size(); ++i) {
      PyTuple_SET_ITEM(all, static_cast<Py_ssize_t>(i), PyLong_FromLongLong(values[i]));
    }
    return all;
  }

  void take(size_t i, Tensor& out, Dims dims) override {
    const Order* const order = dims == Dims::OfTokens  ? of_tokens_
                               : dims == Dims::OfCache ? of_caches_
                                                       : nullptr;
    if (!is_tensor(args_[i]) || (order == nullptr && dims != Dims::AsInSchema)) throw NotDirect();
    out = read(Py_NewRef(args_[i]), order);
    if (dims == Dims::OfTokens && head_dim_ >= 0 && out.size(out.dim() - 1) != head_dim_) {
      throw NotDirect();
    }
  }
  void take(size_t i, OptionalTensor& out, Dims dims) override {
    if (args_[i] != Py_None) take(i, out.emplace(), dims);
  }
  void take(size_t i, bool& out) override {
    if (!PyBool_Check(args_[i])) throw NotDirect();
    out = args_[i] == Py_True;
  }
  void take(size_t i, std::optional<bool>& out) override {
    if (args_[i] != Py_None) take(i, out.emplace());
  }
  void take(size_t i, int64_t& out) override { out = integer(args_[i]); }
  void take(size_t i, std::optional<int64_t>& out) override {
    if (args_[i] != Py_None) take(i, out.emplace());
  }
  void take(size_t i, double& out) override {
    if (!PyFloat_CheckExact(args_[i])) throw NotDirect();
    out = PyFloat_AS_DOUBLE(args_[i]);
  }
  void take(size_t i, std::optional<ScalarType>& out) override {
    for (size_t d = 0; d < 4; ++d) {
      if (args_[i] == pytorch.dtypes[d]) out = kDTypes[d];
    }
    if (!out && args_[i] != Py_None) throw NotDirect();
  }

  // Owns the object. A tensor in another order than the schema's is seen with two dimensions
  // swapped.
  Tensor read(PyObject* object, const Order* order) {
    Tensor owner(*this, object, {});
    dlpack::Tensor from;
    if (pytorch.api->tensor_from_object(object, &from) != 0) checked(nullptr);
    TensorView::Read out;
    out.sizes = TensorView::Sizes(from.sizes, static_cast<size_t>(from.dims));
    out.strides = from.strides;
    out.dtype = scalar_type(from.dtype);
    out.data = static_cast<char*>(from.data) + from.byte_offset;
    if (from.device.type == dlpack::kCpu) {
      out.device_type = aoti_torch_device_type_cpu();
    } else if (from.device.type == dlpack::kCuda) {
      out.device_type = aoti_torch_device_type_cuda();
      out.device_index = from.device.index;
    } else {
      throw NotDirect();
    }
    if (order != nullptr && order->rank != from.dims) throw NotDirect();
    if (order != nullptr && order->swaps) {
      auto& [sizes, strides, of] = swapped_.at(swapped_count_++);
      std::copy_n(from.sizes, from.dims, sizes);
      std::copy_n(from.strides, from.dims, strides);
      std::swap(sizes[order->first], sizes[order->second]);
      std::swap(strides[order->first], strides[order->second]);
      of = order;
      out.sizes = TensorView::Sizes(sizes, static_cast<size_t>(from.dims));
      out.strides = strides;
    }
    Tensor view(*this, owner.give_away(), out);
    if (from.data == nullptr && view.numel() > 0) throw NotDirect();  // zeros without memory
    return view;
  }

  // The order that swaps dimensions of x, or nullptr.
  const Order* order_of(const TensorView& x) const {
    for (size_t i = 0; i < swapped_count_; ++i) {
      if (swapped_[i].sizes == x.sizes().data()) return swapped_[i].order;
    }
    return nullptr;
  }

  Tensor made(PyObject* object, const Order* order) {
    Tensor out = read(checked(object), order);
    made_.at(made_count_++) = object;
    return out;
  }

  // Owns the object, and returns a new reference.
  static PyObject* transposed(PyObject* object, const Order& order) {
    PyObject* const view =
        PyObject_CallFunction(pytorch.transpose, "OLL", object, static_cast<long long>(order.first),
                              static_cast<long long>(order.second));
    Py_DECREF(object);
    return checked(view);
  }

  // Autograd detects by its version that a saved tensor has been written. Inference tensors have
  // none, and can't be written outside of inference mode.
  void count_versions() {
    if (written_count_ == 0) return;
    PyObject* const written = checked(PyTuple_New(static_cast<Py_ssize_t>(written_count_)));
    for (size_t i = 0; i < written_count_; ++i) {
      PyTuple_SET_ITEM(written, i, Py_NewRef(written_[i]));
    }
    const bool may_be_written =
        is_true(pytorch.is_inference_mode()) ||
        std::all_of(written_.begin(), written_.begin() + written_count_, has_version);
    PyObject* const done =
        may_be_written ? PyObject_CallOneArg(pytorch.increment_version, written) : nullptr;
    Py_DECREF(written);
    Py_DECREF(checked(done));
  }

  static bool has_version(PyObject* tensor) {
    PyObject* const version = pytorch.version(tensor);
    Py_XDECREF(version);
    return version != nullptr;
  }

  struct Swapped {
    int64_t sizes[4], strides[4];
    const Order* order;
  };

  PyObject* const* args_;
  const Order *of_tokens_, *of_caches_;
  int64_t head_dim_;
  std::array<Swapped, 8> swapped_;
  std::array<PyObject*, 8> written_;
  std::array<PyObject*, 8> made_;
  std::array<PyObject*, 4> results_{};
  size_t swapped_count_ = 0, written_count_ = 0, made_count_ = 0;
  bool has_begun_ = false;
  PyThreadState* thread_ = nullptr;
};

// The order of this name; nullptr: there is none.
const Order* find(const std::vector<Order>& orders, PyObject* name) {
  for (const Order& order : orders) {
    if (order.name == name) return &order;
  }
  return nullptr;
}

// (layout, cache_layout, head_dim, *all arguments of the operator) -> its results, or
// NotImplemented
PyObject* call_directly(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto& op = *static_cast<const Operator*>(PyCapsule_GetPointer(self, nullptr));
  constexpr Py_ssize_t kBefore = 3;
  const auto arguments = static_cast<Py_ssize_t>(op.arguments);
  if (count != kBefore + arguments) {
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", op.name,
                 kBefore + arguments, count);
    return nullptr;
  }
  bool has_begun = false;
  try {
    if (can_be_direct(args + kBefore, op.arguments)) {
      DirectCall call(args + kBefore, find(pytorch.layouts, args[0]),
                      find(pytorch.cache_layouts, args[1]),
                      args[2] == Py_None ? -1 : integer(args[2]));
      try {
        op.run(call);
      } catch (...) {
        has_begun = call.has_begun();
        throw;
      }
      return call.results(op.results);
    }
  } catch (const std::exception& error) {
    if (has_begun) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }
  return Py_NewRef(Py_NotImplemented);
}

PyObject* kept(const py::handle& object) {
  return py::reinterpret_borrow<py::object>(object).release().ptr();
}

// layouts: name -> number of dimensions, and the two to swap or None.
std::vector<Order> orders_of(const py::dict& layouts) {
  std::vector<Order> out;
  for (const auto& [name, order] : layouts) {
    const auto [rank, swap] = order.cast<std::pair<int64_t, py::object>>();
    const auto [first, second] =
        swap.is_none() ? std::pair<int64_t, int64_t>() : swap.cast<std::pair<int64_t, int64_t>>();
    out.push_back({kept(name), rank, !swap.is_none(), first, second});
  }
  return out;
}

// of: see rope_ext/_engine/direct.py
void set_pytorch(const py::dict& of) {
  const auto object = [&](const char* name) { return kept(of[name]); };
  PyObject* const capsule = object("exchange_api");
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->version.major != 1) throw py::value_error("a DLPack exchange API of another version");
  pytorch.api = api;
  const auto types = of["types"].cast<py::tuple>();
  pytorch.tensor = reinterpret_cast<PyTypeObject*>(kept(types[0]));
  pytorch.parameter = reinterpret_cast<PyTypeObject*>(kept(types[1]));
  const auto dtypes = of["dtypes"].cast<py::tuple>();
  for (size_t i = 0; i < 4; ++i) pytorch.dtypes[i] = kept(dtypes[i]);
  for (const py::handle condition : of["unless"].cast<py::tuple>()) {
    pytorch.unless.emplace_back(kept(condition));
  }
  pytorch.is_negative = Question(object("is_negative"));
  pytorch.is_inference_mode = Question(object("is_inference_mode"));
  pytorch.requires_grad = Question(object("requires_grad"));
  pytorch.version = Question(object("version"));
  std::tie(pytorch.forward_ad, pytorch.forward_level) =
      std::pair(kept(of["forward_level"][py::int_(0)]), kept(of["forward_level"][py::int_(1)]));
  pytorch.increment_version = object("increment_version");
  pytorch.empty_like = object("empty_like");
  pytorch.new_empty_strided = object("new_empty_strided");
  pytorch.transpose = object("transpose");
  pytorch.layouts = orders_of(of["layouts"]);
  pytorch.cache_layouts = orders_of(of["cache_layouts"]);
}

}  // namespace

void add_direct_calls(py::module_& m) {
  static std::deque<PyMethodDef> methods;
  py::dict calls;
  for (const Operator& op : operators()) {
    methods.push_back(
        {op.name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_directly)),
         METH_FASTCALL,
         "(layout, cache_layout, head_dim, *all arguments of the operator) -> its "
         "results, or NotImplemented, before anything is written: call the operator."});
    const auto self = py::reinterpret_steal<py::object>(
        PyCapsule_New(const_cast<Operator*>(&op), nullptr, nullptr));
    calls[op.name] =
        py::reinterpret_steal<py::object>(PyCFunction_NewEx(&methods.back(), self.ptr(), nullptr));
  }
  m.attr("direct_calls") = calls;
  m.def("set_pytorch", &set_pytorch, "What direct calls need of PyTorch.");
  m.def(
      "use_direct_calls",
      [](bool use) { return std::exchange(in_use, use && pytorch.api != nullptr); }, py::arg("use"),
      "Whether direct calls are direct, or return NotImplemented. Returns as it was.");
}

}  // namespace rope
