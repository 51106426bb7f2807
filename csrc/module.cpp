// The Python module `empcause._C`. Importing it registers the operators of library.cpp with torch.
#include <pybind11/pybind11.h>

#include "cpu/attention.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
#if defined(__x86_64__)
  info["isa_built"] = py::make_tuple("baseline", "avx2", "avx512");
#else
  info["isa_built"] = py::make_tuple("baseline");
#endif
  info["isa_selected"] = empcause::cpu::select_kernels().isa;
  info["torch_target"] = EMPCAUSE_TORCH_TARGET;
  return info;
}

int64_t multiply_adds(int64_t rounds) { return empcause::cpu::select_kernels().multiply_adds(rounds); }

float read_all(uintptr_t address, int64_t count) {
  return empcause::cpu::select_kernels().read_all(reinterpret_cast<const float*>(address), count);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native part of empcause: importing it registers torch.ops.empcause.*";
  module.def("build_info", &build_info,
             "Compiler, instruction sets built and selected, and the torch whose stable ABI this was built for.\n\n"
             "Raises RuntimeError where EMPCAUSE_CPU_ISA names kernels that are unknown or do not run here.");
  const py::call_guard<py::gil_scoped_release> without_lock;
  module.def("multiply_adds", &multiply_adds, py::arg("rounds"), without_lock,
             "Runs independent chains of fp32 multiply-adds in one thread: the FLOPs it did, to be timed.");
  module.def("read_all", &read_all, py::arg("address"), py::arg("count"), without_lock,
             "Reads `count` fp32 values in memory in one thread, to be timed: their sum.");
}
