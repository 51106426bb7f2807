// A libtorch_cuda.so for machines without a GPU: "CUDA" tensors lie in the host's memory, and the stream of a device is
// a number that the kernels of stub_kernels.cpp write into their results.
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/strides.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>

namespace {

const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const at::Device device(at::kCUDA, 0);
  const auto options = at::TensorOptions().dtype(dtype.value_or(at::kFloat)).device(device);
  void* memory = std::calloc(static_cast<size_t>(last > 0 ? last + 1 : 1), 8);
  return at::from_blob(memory, sizes, strides, [](void* data) { std::free(data); }, options, device);
}

// Python's own functions would look for a GPU before they make a tensor there or read one.
at::Tensor zeros(at::IntArrayRef sizes) {
  return empty_strided(sizes, c10::contiguous_strides(sizes), at::kFloat, {}, {}, {});
}
double first(const at::Tensor& tensor) { return *static_cast<const float*>(tensor.const_data_ptr()); }

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("empty_strided", empty_strided); }
TORCH_LIBRARY(stub_cuda, library) {
  library.def("zeros", [](c10::List<int64_t> sizes) { return zeros(sizes.vec()); });
  library.def("first", first);
}

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(1000 + device_index));
  return 0;
}
