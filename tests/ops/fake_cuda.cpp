// Tells torch that switching between CUDA devices needs nothing, so that a torch built without CUDA computes with fake CUDA tensors.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

}  // namespace
