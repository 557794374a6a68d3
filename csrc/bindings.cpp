// dse_ext._C: what the build knows about itself, and the operators on NumPy arrays.
//
// Arrays become tensors that share their memory, go through torch's dispatcher to the operators of ops.cpp, and
// the results come back as arrays that share the tensors' memory: callers never see a tensor. Like the operators
// this module uses the stable ABI alone, so it needs rebuilding for another Python, not for another torch.

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/arguments.h"
#include "cpu/validate.h"
#include "dse_build_config.h"

namespace py = pybind11;

namespace dse {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// --- arrays and tensors --------------------------------------------------------------------------------------

// Runs a check of cpu/validate.h: what it rejects is the caller's argument, hence a ValueError.
template <typename Check>
void as_value_error(const Check& check) {
  try {
    check();
  } catch (const std::runtime_error& error) {
    throw py::value_error(error.what());
  }
}

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

py::array require_array(const py::object& object, const char* argument) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(argument) + " must be a numpy.ndarray, got " +
                         text(py::type::of(object).attr("__name__")) + ".");
  }
  return py::reinterpret_borrow<py::array>(object);
}

ScalarType scalar_type_of(const py::dtype& dtype, const char* argument) {
  if (dtype.attr("isnative").cast<bool>()) {
    const char kind = dtype.kind();
    const py::ssize_t size = dtype.itemsize();
    if (kind == 'f' && size == 8) return ScalarType::Double;
    if (kind == 'f' && size == 4) return ScalarType::Float;
    if (kind == 'f' && size == 2) return ScalarType::Half;
    if (kind == 'i' && size == 8) return ScalarType::Long;
  }
  throw py::value_error(std::string(argument) +
                        " must have dtype float64, float32 or float16 in the machine's byte order, got " +
                        text(dtype) + ".");
}

// Whether torch can describe the array's memory as it is.
bool shareable(const py::array& array) {
  const py::ssize_t size = array.itemsize();
  if (reinterpret_cast<std::uintptr_t>(array.data()) % static_cast<std::uintptr_t>(size) != 0) return false;
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    if (array.strides(axis) < 0 || array.strides(axis) % size != 0) return false;
  }
  return true;
}

// A tensor that shares the array's memory and keeps it alive; the few arrays that torch cannot describe
// (reversed axes, fields of records) are copied.
Tensor tensor_of(py::array array, const char* argument) {
  const ScalarType type = scalar_type_of(array.dtype(), argument);
  if (!shareable(array)) array = array.attr("copy")().cast<py::array>();
  std::vector<int64_t> sizes, strides;
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    sizes.push_back(array.shape(axis));
    strides.push_back(array.strides(axis) / array.itemsize());
  }
  void* data = const_cast<void*>(array.data());  // operators do not write to their inputs
  // On the heap: whoever lets go of the tensor last may not hold the GIL.
  auto* owner = new py::array(std::move(array));
  return torch::stable::from_blob(data, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                                  torch::stable::Device(DeviceType::CPU), type, [owner](void*) {
                                    const py::gil_scoped_acquire gil;
                                    delete owner;
                                  });
}

Tensor features_of(const py::object& object, const char* argument, const char* axes) {
  const Tensor tensor = tensor_of(require_array(object, argument), argument);
  if (tensor.scalar_type() == ScalarType::Long) {
    throw py::value_error(std::string(argument) + " must have dtype float64, float32 or float16, got int64.");
  }
  if (axes != nullptr) as_value_error([&] { cpu::require_features(tensor, argument, axes); });
  return tensor;
}

// Labels as int64, not yet checked further.
Tensor labels_of(const py::object& object, const char* argument) {
  py::array array = require_array(object, argument);
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') {
    throw py::value_error(std::string(argument) + " must have an integer dtype, got " + text(array.dtype()) +
                          ".");
  }
  array = array.attr("astype")("int64", py::arg("copy") = false).cast<py::array>();
  return tensor_of(array, argument);
}

Tensor seed_tensor(int64_t seed) { return tensor_of(py::array_t<int64_t>(1, &seed), "seed"); }

py::dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return py::dtype::of<double>();
    case ScalarType::Float: return py::dtype::of<float>();
    case ScalarType::Half: return py::dtype("float16");
    case ScalarType::Long: return py::dtype::of<int64_t>();
    default: throw std::runtime_error("An operator returned a type that NumPy does not have.");
  }
}

// An array that shares the tensor's memory and keeps it alive; a NumPy scalar for a tensor of no dimensions.
py::object array_of(const Tensor& tensor) {
  std::vector<py::ssize_t> sizes, strides;
  const auto bytes = static_cast<py::ssize_t>(tensor.element_size());
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    sizes.push_back(tensor.size(axis));
    strides.push_back(tensor.stride(axis) * bytes);
  }
  const py::capsule owner(new Tensor(tensor), [](void* pointer) { delete static_cast<Tensor*>(pointer); });
  py::array array(dtype_of(tensor.scalar_type()), sizes, strides, tensor.data_ptr(), owner);
  if (sizes.empty()) return array[py::tuple()];
  return array;
}

// --- the dispatcher ------------------------------------------------------------------------------------------

// Calls dse_ext::<op>, which returns kOutputs tensors, without the GIL.
template <size_t kOutputs, typename... Args>
std::array<Tensor, kOutputs> call(const char* op, const Args&... args) {
  std::array<StableIValue, std::max(kOutputs, sizeof...(Args))> stack{from(args)...};
  AOTITorchError error;
  {
    const py::gil_scoped_release release;
    error = torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION);
  }
  if (error != TORCH_SUCCESS) {
    // Only torch 2.13 and later tell why through the stable ABI; hence the checks of arguments above.
    const char* why = TORCH_DYNAMIC_VERSION_CALL_2_13_0(torch_exception_get_what_without_backtrace,
                                                        torch::stable::detail::torch_shim_bc_const_char_ptr);
    throw std::runtime_error(std::string(op) + " failed" + (why != nullptr ? std::string(": ") + why : "."));
  }
  std::array<Tensor, kOutputs> outputs;
  for (size_t i = 0; i < kOutputs; ++i) outputs[i] = to<Tensor>(stack[i]);
  return outputs;
}

// --- entry points --------------------------------------------------------------------------------------------

py::dict dse_components(const py::object& array, const std::string& variant, int64_t local_clusters,
                        int64_t global_clusters, std::optional<int64_t> group_images, bool normalize,
                        int64_t max_kmeans_iters, double tol, int64_t seed, const py::object& local_labels,
                        const py::object& global_labels, const py::object& global_centroids) {
  const Tensor z = features_of(array, "array", "(images, positions, features)");
  std::optional<Tensor> local, global, centroids;
  if (!local_labels.is_none()) local = labels_of(local_labels, "local_labels");
  if (!global_labels.is_none()) global = labels_of(global_labels, "global_labels");
  if (!global_centroids.is_none()) centroids = features_of(global_centroids, "global_centroids", nullptr);
  as_value_error([&] {
    Problem problem = cpu::make_problem(z, variant, local_clusters, global_clusters, group_images, normalize);
    cpu::require_kmeans_options(max_kmeans_iters, tol, "max_kmeans_iters");
    cpu::apply_given(problem, local, global, centroids);
  });
  constexpr size_t kComponents = 8, kSaved = 5;
  const auto outputs = call<kComponents + kSaved>(
      "dse_ext::dse_components", z, seed_tensor(seed), variant, local_clusters, global_clusters, group_images,
      normalize, max_kmeans_iters, tol, local, global, centroids, /*save_for_backward=*/false);
  static constexpr std::array<const char*, kComponents> kNames{
      "m_inter",  "m_intra_image", "m_intra_batch", "m_dim",
      "avg_norm", "local_labels",  "global_labels", "global_centroids"};
  py::dict result;
  for (size_t i = 0; i < kComponents; ++i) result[kNames[i]] = array_of(outputs[i]);
  return result;
}

py::tuple kmeans(const py::object& array, int64_t k, int64_t max_iters, double tol, int64_t seed) {
  const Tensor x = features_of(array, "array", "(problems, rows, features)");
  as_value_error([&] {
    cpu::require_at_least(k, 1, "k");
    cpu::require_kmeans_options(max_iters, tol, "max_iters");
  });
  const auto outputs = call<3>("dse_ext::kmeans", x, k, seed_tensor(seed), max_iters, tol);
  return py::make_tuple(array_of(outputs[0]), array_of(outputs[1]), array_of(outputs[2]));
}

py::object cluster_nuclear_norms(const py::object& array, const py::object& labels, int64_t k) {
  const Tensor x = features_of(array, "array", "(problems, rows, features)");
  const Tensor label = labels_of(labels, "labels");
  as_value_error([&] {
    cpu::require_at_least(k, 1, "k");
    cpu::require_labels(label, x.size(0), x.size(1), k, "labels");
  });
  const auto outputs = call<3>("dse_ext::cluster_nuclear_norms", x, label, k, /*save_for_backward=*/false);
  return array_of(outputs[0]);
}

py::object effective_rank(const py::object& array, bool center) {
  const Tensor x = features_of(array, "array", nullptr);
  if (x.dim() < 2 || x.numel() == 0) {
    throw py::value_error("array must have shape (..., rows, features) and no empty axis, got shape " +
                          cpu::shape_of(x) + ".");
  }
  const auto outputs = call<3>("dse_ext::effective_rank", x, center, /*save_for_backward=*/false);
  return array_of(outputs[0]);
}

// --- the build -----------------------------------------------------------------------------------------------

py::list split(std::string_view list) {
  py::list parts;
  while (!list.empty()) {
    const size_t end = std::min(list.find_first_of("; "), list.size());
    if (end > 0) parts.append(py::str(std::string(list.substr(0, end))));
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return parts;
}

py::object text_or_none(const char* value) {
  if (*value == '\0') return py::none();
  return py::str(value);
}

py::dict build_info() {
  py::dict info;
  info["version"] = DSE_EXT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang";
  info["compiler_version"] = __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc";
  info["compiler_version"] = __VERSION__;
#else
  info["compiler"] = "unknown";
  info["compiler_version"] = "unknown";
#endif
  info["cxx_standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
  info["cxx_flags"] = DSE_EXT_CXX_FLAGS;
  info["torch_abi"] = DSE_EXT_TORCH_TARGET_ABI;
  info["torch_version"] = DSE_EXT_TORCH_BUILD_VERSION;
  info["cuda"] = py::bool_(DSE_EXT_WITH_CUDA);
  info["cuda_compiler"] = text_or_none(DSE_EXT_CUDA_COMPILER);
  info["cuda_archs"] = split(DSE_EXT_CUDA_ARCHS);
  info["cuda_reason"] = text_or_none(DSE_EXT_CUDA_REASON);
  return info;
}

}  // namespace
}  // namespace dse

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.doc() = "Facts about the build of dse_ext, and its operators on NumPy arrays.";
  m.def("build_info", &dse::build_info,
        "Return a dict: version, compiler, compiler_version, cxx_standard, cxx_flags, torch_abi (the oldest\n"
        "LibTorch ABI that the binary runs on), torch_version (at build time), cuda, cuda_compiler,\n"
        "cuda_archs, cuda_reason (why there is no CUDA library, or None).");
  m.def("dse_components", &dse::dse_components, arg("array"), py::kw_only(), arg("variant") = "regularizer",
        arg("local_clusters") = 3, arg("global_clusters") = 24, arg("group_images") = py::none(),
        arg("normalize") = true, arg("max_kmeans_iters") = 20, arg("tol") = 1e-4, arg("seed") = 0,
        arg("local_labels") = py::none(), arg("global_labels") = py::none(), arg("global_centroids") = py::none(),
        "The DSE components of an array of shape (images, positions, features), float64, float32 or float16,\n"
        "as a dict of NumPy scalars (m_inter, m_intra_image, m_intra_batch, m_dim, avg_norm) and arrays\n"
        "(local_labels, global_labels, global_centroids). Same definitions as dse_ext.dse_components.\n"
        "Raises ValueError for an argument out of its range.");
  m.def("kmeans", &dse::kmeans, arg("array"), arg("k"), py::kw_only(), arg("max_iters") = 20, arg("tol") = 1e-4,
        arg("seed") = 0,
        "k-means of each problem of an array of shape (problems, rows, features): centroids\n"
        "(problems, k, features), labels (problems, rows), inertia (problems,).");
  m.def("cluster_nuclear_norms", &dse::cluster_nuclear_norms, arg("array"), arg("labels"), arg("k"),
        "Nuclear norm of each centred cluster: (problems, rows, features), (problems, rows) ->\n"
        "(problems, k); 0 for clusters of fewer than two rows.");
  m.def("effective_rank", &dse::effective_rank, arg("array"), py::kw_only(), arg("center") = false,
        "exp of the entropy of the normalized singular values: (..., rows, features) -> (...).");
}
