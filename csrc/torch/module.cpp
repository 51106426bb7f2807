// The Python module `empcause._C`. Importing it registers the operators of cpu.cpp with torch.
#include <pybind11/pybind11.h>

#include <numeric>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/limits.h"
#include "parallel.h"

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
  info["isa_built"] = py::make_tuple("baseline", "avx2", "avx512", "avx512_bf16");
#else
  info["isa_built"] = py::make_tuple("baseline");
#endif
  info["isa_selected"] = empcause::cpu::select_kernels().isa;
  info["torch_target"] = EMPCAUSE_TORCH_TARGET;
  return info;
}

// Runs Limits::multiply_adds once per task, in parallel, and returns the FLOPs of all tasks.
int64_t multiply_adds(int64_t rounds, int64_t tasks, bool bfloat16) {
  std::vector<int64_t> flops(static_cast<size_t>(tasks));
  struct Work {
    empcause::DType dtype;
    int64_t rounds, *flops;
  } work{bfloat16 ? empcause::DType::kBFloat16 : empcause::DType::kFloat32, rounds, flops.data()};
  const auto task = [](void* pointer, int64_t index, int64_t) {
    const Work& w = *static_cast<const Work*>(pointer);
    w.flops[index] = empcause::cpu::select_limits().multiply_adds(w.dtype, w.rounds);
  };
  empcause::parallel_for(tasks, task, &work);
  return std::accumulate(flops.begin(), flops.end(), int64_t{0});
}

// Runs Limits::read_all in parallel, each task on one part of the array, and returns the sum of all values.
float read_all(uintptr_t address, int64_t count, int64_t tasks) {
  std::vector<float> sums(static_cast<size_t>(tasks));
  struct Work {
    const float* data;
    int64_t count, tasks;
    float* sums;
  } work{reinterpret_cast<const float*>(address), count, tasks, sums.data()};
  const auto task = [](void* pointer, int64_t index, int64_t) {
    const Work& w = *static_cast<const Work*>(pointer);
    const int64_t first = w.count * index / w.tasks, last = w.count * (index + 1) / w.tasks;
    w.sums[index] = empcause::cpu::select_limits().read_all(w.data + first, last - first);
  };
  empcause::parallel_for(tasks, task, &work);
  return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native part of empcause: importing it registers torch.ops.empcause_cpu.";
  module.def(
      "build_info", &build_info,
      "Return compiler, instruction sets built, instruction set selected, and the torch whose stable ABI is used.\n\n"
      "Raises RuntimeError where EMPCAUSE_CPU_ISA names kernels that are unknown or do not run on this processor.");
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def("multiply_adds", &multiply_adds, py::arg("rounds"), py::arg("tasks"), py::arg("bfloat16") = false,
             without_gil,
             "Run independent chains of multiply-adds, `rounds` in each of `tasks` tasks on torch's threads.\n\n"
             "The operands are fp32, or with `bfloat16` those that the kernels multiply bf16 tensors as. The caller\n"
             "times it. Return the number of FLOPs.");
  module.def(
      "read_all", &read_all, py::arg("address"), py::arg("count"), py::arg("tasks"), without_gil,
      "Read `count` fp32 values from `address` on, in `tasks` parts on torch's threads, and return their sum.\n\n"
      "The caller times it.");
}
