// The checks of the raw operators' arguments and their error messages, in one place for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace empcause {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLargestHeadDim = 256;
constexpr double kMostElements = 0x1p60;  // of any tensor, so that the number of its bytes fits 64 bits

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("empcause: ") + what);
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

template <class Sizes>
std::string size_list(const Sizes& sizes) {
  std::string list = "[";
  for (const int64_t size : sizes) list += (list.size() > 1 ? ", " : "") + std::to_string(size);
  return list + "]";
}

// The device of a tensor.
struct TensorDevice {
  int32_t type = 0, index = 0;

  explicit TensorDevice(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  }

  bool operator==(const TensorDevice& other) const { return type == other.type && index == other.index; }
  std::string name() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    return type == aoti_torch_device_type_cuda() ? "cuda:" + std::to_string(index) : "another device";
  }
};

[[noreturn]] inline void refuse(const char* name, const std::string& expected, const Tensor& tensor) {
  throw std::runtime_error("empcause: " + (name + (" must be " + expected)) + ", not " +
                           dtype_name(tensor.scalar_type()) + " " + size_list(tensor.sizes()) + " on " +
                           TensorDevice(tensor).name());
}

// Checks the tensors of one call: all must be on the device of the first, with the dtype and sizes that
// are expected. Throws std::runtime_error that names the argument, what was expected and what it is.
class Arguments {
 public:
  explicit Arguments(const Tensor& first) : device_(first) {}

  void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) const {
    const auto actual = tensor.sizes();
    if (tensor.scalar_type() == dtype && std::equal(sizes.begin(), sizes.end(), actual.begin(), actual.end()) &&
        TensorDevice(tensor) == device_) {
      return;
    }
    refuse(name, std::string(dtype_name(dtype)) + " " + size_list(sizes) + " on " + device_.name(), tensor);
  }

  // Checks a tensor that kernels read without strides.
  void check_contiguous(const char* name, const Tensor& tensor, ScalarType dtype,
                        std::initializer_list<int64_t> sizes) const {
    check(name, tensor, dtype, sizes);
    if (tensor.is_contiguous()) return;
    throw std::runtime_error(std::string("empcause: ") + name + " must be contiguous: pass a copy by .contiguous()");
  }

  // Checks one int64 number in memory of the device, if it is given.
  void check_number(const char* name, const OptionalTensor& tensor) const {
    if (tensor.has_value()) check(name, *tensor, ScalarType::Long, {});
  }

 private:
  TensorDevice device_;
};

}  // namespace empcause
