// The Python module `empcause._C`. Importing it registers the operators of library.cpp with torch.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = "GCC " __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native part of empcause: importing it registers torch.ops.empcause.*";
  module.def("build_info", &build_info, "Facts of this build.");
}
