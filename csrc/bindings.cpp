// Registration only: op schemas, their CPU implementations, and the _C module with what is not a tensor op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "api/ops.h"
#include "build_info.h"
#include "cpu/kernels.h"

namespace py = pybind11;
namespace api = qwen_sparse::api;

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

STABLE_TORCH_LIBRARY(qwen_sparse, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int? window)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "vertical_slash_attention(Tensor q, Tensor k, Tensor v, Tensor vertical_indexes, Tensor slash_indexes,"
      " float softmax_scale) -> (Tensor out, Tensor lse, Tensor attended)");
  m.def(
      "dual_chunk_attention(Tensor q_intra, Tensor q_succ, Tensor q_inter, Tensor k, Tensor v, int chunk_len,"
      " Tensor? vertical_indexes, Tensor? slash_indexes, float softmax_scale)"
      " -> (Tensor out, Tensor lse, Tensor attended)");
  m.def(
      "select_vertical_slash(Tensor q, Tensor k, int[] vertical_size, int[] slash_size, int last_q,"
      " float softmax_scale, Tensor? q_succ, Tensor? q_inter, int? chunk_len)"
      " -> (Tensor vertical_indexes, Tensor slash_indexes)");
  m.def("top_indexes(Tensor scores, int[] sizes, int num_forced) -> Tensor");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, float attention_factor)"
      " -> (Tensor q_out, Tensor k_out)");
  m.def(
      "rotary_dual_chunk(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, float attention_factor,"
      " int chunk_size, int chunk_len, int critical_rows) -> (Tensor q_intra, Tensor q_succ, Tensor q_inter,"
      " Tensor k_out, Tensor q_succ_critical, Tensor q_inter_critical)");
  m.def(
      "quantize_kv(Tensor k, Tensor v, Tensor? k_bias, Tensor? positions, Tensor? inv_freq, float attention_factor)"
      " -> (Tensor k_int8, Tensor k_scale, Tensor v_int8, Tensor v_scale)");
  m.def(
      "dequantize_kv(Tensor k, Tensor k_scale, Tensor v, Tensor v_scale, Tensor? k_bias, Tensor? positions,"
      " Tensor? inv_freq, float attention_factor, ScalarType dtype) -> (Tensor k_out, Tensor v_out)");
  m.def(
      "gather_kv(Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor? k_scale, Tensor? v_scale, Tensor? k_bias,"
      " Tensor? inv_freq, float attention_factor, int? chunk_len, Tensor(a!) k_out, Tensor(b!) v_out) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seqlens_k,"
      " Tensor? k_scale, Tensor? v_scale, Tensor? k_bias, Tensor? inv_freq, float attention_factor, Tensor? q_succ,"
      " Tensor? q_inter, int? chunk_len, float softmax_scale, int? window) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(qwen_sparse, CPU, m) {
  m.impl("attention", TORCH_BOX(&api::attention));
  m.impl("vertical_slash_attention", TORCH_BOX(&api::vertical_slash_attention));
  m.impl("dual_chunk_attention", TORCH_BOX(&api::dual_chunk_attention));
  m.impl("select_vertical_slash", TORCH_BOX(&api::select_vertical_slash));
  m.impl("top_indexes", TORCH_BOX(&api::top_indexes));
  m.impl("rotary", TORCH_BOX(&api::rotary));
  m.impl("rotary_dual_chunk", TORCH_BOX(&api::rotary_dual_chunk));
  m.impl("quantize_kv", TORCH_BOX(&api::quantize_kv));
  m.impl("dequantize_kv", TORCH_BOX(&api::dequantize_kv));
  m.impl("gather_kv", TORCH_BOX(&api::gather_kv));
  m.impl("decode_attention", TORCH_BOX(&api::decode_attention));
}

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
}
