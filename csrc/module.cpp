// The Python module _C: what is not a tensor op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>

#include "build_info.h"
#include "cpu/kernels.h"
#include "cuda/arch.h"

namespace py = pybind11;

namespace {

// A CMake list ("a;b") as a Python list.
py::list split(const char* text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) parts.append(part);
  return parts;
}

py::object string_or_none(const char* text) { return text[0] == '\0' ? py::object(py::none()) : py::str(text); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.qwen_sparse; build and CPU information.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = QWEN_SPARSE_VERSION;
    info["compiler"] = QWEN_SPARSE_COMPILER;
    info["build_type"] = QWEN_SPARSE_BUILD_TYPE;
    info["torch"] = QWEN_SPARSE_TORCH_VERSION;
    info["cpu_isas"] = split(QWEN_SPARSE_CPU_ISAS);
    info["cuda"] = string_or_none(QWEN_SPARSE_CUDA_VERSION);
    info["cuda_archs"] = split(QWEN_SPARSE_CUDA_ARCHS);
    info["cutlass"] = string_or_none(QWEN_SPARSE_CUTLASS_VERSION);
    return info;
  });
  m.def("cpu_features", [] {
    py::dict features;
    features["isa"] = qwen_sparse::cpu::kernels().isa;
    features["supported"] = qwen_sparse::cpu::supported_isas();
    features["fast_matmul"] = qwen_sparse::cpu::fast_matmul_dtypes();
    return features;
  });
  m.def("set_cpu_isa", &qwen_sparse::cpu::set_isa, py::arg("isa"));
  m.def("set_cuda_arch", &qwen_sparse::cuda::set_arch, py::arg("arch"));
}
