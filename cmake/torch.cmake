# Defines qwen_sparse_torch: the headers and libraries of the torch that the building Python imports.
#
# find_package(Torch) is avoided: it overrides CMAKE_CUDA_ARCHITECTURES and fails without a CUDA toolkit. The extension
# uses torch's stable ABI only, so one build serves every later torch.

execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__version__); print(torch.__path__[0])"
  OUTPUT_VARIABLE torch_facts
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_status EQUAL 0)
  message(FATAL_ERROR
    "qwen_sparse: torch cannot be imported by the Python that builds (${Python_EXECUTABLE}).\n"
    "Build isolation hides the installed torch. Install the build requirements once and build without isolation:\n"
    "    pip install 'torch>=2.10' scikit-build-core pybind11 cmake ninja\n"
    "    pip install --no-build-isolation .\n"
    "${torch_error}")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 QWEN_SPARSE_TORCH_VERSION)
list(GET torch_facts 1 torch_path)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${QWEN_SPARSE_TORCH_VERSION}")
if(torch_release VERSION_LESS 2.10)
  message(FATAL_ERROR "qwen_sparse: torch must be 2.10 or newer, found ${QWEN_SPARSE_TORCH_VERSION}")
endif()
message(STATUS "qwen_sparse: torch ${QWEN_SPARSE_TORCH_VERSION}")

find_library(QWEN_SPARSE_TORCH_CPU torch_cpu PATHS ${torch_path}/lib NO_DEFAULT_PATH REQUIRED NO_CACHE)
add_library(qwen_sparse_torch INTERFACE)
target_include_directories(qwen_sparse_torch SYSTEM INTERFACE ${torch_path}/include)
target_link_libraries(qwen_sparse_torch INTERFACE ${QWEN_SPARSE_TORCH_CPU})
target_compile_definitions(qwen_sparse_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# torch is imported before the extension, so its library is found by name; no path of the build machine goes in.
set(CMAKE_SKIP_BUILD_RPATH ON)
set(CMAKE_SKIP_INSTALL_RPATH ON)
