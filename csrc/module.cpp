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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native part of empcause: importing it registers torch.ops.empcause.*";
  module.def("build_info", &build_info,
             "Compiler, instruction sets built and selected, and the torch whose stable ABI this was built for.\n\n"
             "Raises RuntimeError where EMPCAUSE_CPU_ISA names kernels that are unknown or do not run here.");
}
