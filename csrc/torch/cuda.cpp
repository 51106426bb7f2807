// torch.ops.empcause_cuda: the raw operators on CUDA devices, or on CPU tensors if built for the emulator.
#if !defined(EMPCAUSE_CUDA_EMULATION)
#include <dlfcn.h>
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "../cuda/kernels.h"
#include "operators.h"
#if defined(EMPCAUSE_CUDA_EMULATION)
#include "../cuda/emulator/emulator.h"
#endif

namespace empcause {
namespace {

#if defined(EMPCAUSE_CUDA_EMULATION)

// Allows the emulator to access the tensors of the call and nothing else.
class Context {
 public:
  explicit Context(const Tensor&) { cuda::emulator::forbid_all(); }
  ~Context() { cuda::emulator::forbid_all(); }

  void borrow(const Tensor& tensor) {
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    cuda::emulator::allow(tensor.data_ptr(), static_cast<size_t>(last + 1) * tensor.element_size());
  }

  cuda::Stream stream() { return nullptr; }
};

#else

// torch's function that returns the current stream of a device. It is looked up in libtorch_cuda.so at the first call,
// because torch loads that library with local visibility, and because this library must load where there is none.
decltype(&aoti_torch_get_current_cuda_stream) current_stream_function() {
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    require(symbol != nullptr, "the CUDA backend needs a torch that is built for CUDA");
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(symbol);
  }();
  return function;
}

// Makes the tensors' device the current one for the duration of the call.
class Context {
 public:
  explicit Context(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {}

  void borrow(const Tensor&) {}

  cuda::Stream stream() {
    void* stream = nullptr;
    require(current_stream_function()(index_, &stream) == AOTI_TORCH_SUCCESS, "no current CUDA stream");
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

class Cuda {
 public:
  static constexpr const char* kName = "cuda";
  static constexpr bool kLosslessStatistics = false;
  static constexpr bool kOnesAreNull = true;

#if defined(EMPCAUSE_CUDA_EMULATION)
  static bool takes(const Tensor& tensor) { return tensor.is_cpu(); }
#else
  static bool takes(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

  explicit Cuda(const Tensor& like) : context_(like) {}

  void borrow(const Tensor& tensor) { context_.borrow(tensor); }

  // The prefix sums are not checked here, as that would wait for the device; sequence() clamps those that do not fit.
  void check_packing(Attention& a, int64_t longest_query, int64_t longest_key) {
    a.num_queries = longest_query;
    a.num_keys = longest_key;
  }

  void compute_weights(const KeyWeights& w) { cuda::compute_weights(w, context_.stream()); }
  void reduce_grad_cause(const GradCause& g) { cuda::reduce_grad_cause(g, context_.stream()); }

  void forward(const Attention& a, const Tensor& like) {
    const Tensor scratch = new_scratch(like, cuda::forward_scratch(a));
    cuda::forward(a, static_cast<float*>(scratch.data_ptr()), context_.stream());
  }

  void backward(const AttentionBackward& g, const Tensor& like) {
    const Tensor scratch = new_scratch(like, cuda::backward_scratch(g));
    cuda::backward(g, static_cast<float*>(scratch.data_ptr()), context_.stream());
  }

 private:
  // Returns memory that is freed when the call ends; torch reuses it in the order of the stream, so after the kernels.
  Tensor new_scratch(const Tensor& like, int64_t num_floats) {
    Tensor scratch = empty<1>(like, {num_floats}, ScalarType::Float);
    borrow(scratch);
    return scratch;
  }

  Context context_;
};

}  // namespace
}  // namespace empcause

#if defined(EMPCAUSE_CUDA_EMULATION)
// For tests: what the process has launched and computed.
extern "C" [[gnu::visibility("default")]] uint64_t empcause_cuda_launches() {
  return empcause::cuda::emulator::launches();
}
extern "C" [[gnu::visibility("default")]] uint64_t empcause_cuda_products() {
  return empcause::cuda::emulator::products();
}
#endif

STABLE_TORCH_LIBRARY(empcause_cuda, library) { EMPCAUSE_DEFINE_OPERATORS(library); }

#if defined(EMPCAUSE_CUDA_EMULATION)
STABLE_TORCH_LIBRARY_IMPL(empcause_cuda, CPU, library) { EMPCAUSE_IMPLEMENT_OPERATORS(library, empcause::Cuda); }
#else
STABLE_TORCH_LIBRARY_IMPL(empcause_cuda, CUDA, library) { EMPCAUSE_IMPLEMENT_OPERATORS(library, empcause::Cuda); }
#endif
