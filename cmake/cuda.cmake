# CUDA kernels: on when nvcc is found (QWEN_SPARSE_CUDA=auto), required (1) or off (0).
#
# The runtime is linked statically and the driver is reached at run time, so the module imports without either.
# csrc/cuda/smxx (every architecture) and csrc/cuda/sm80 are compiled to SASS for sm_80 and sm_90 (which would take some
# ten seconds in a process that finds PTX only) and to PTX for later cards, csrc/cuda/sm90 to sm_90a SASS only; it needs
# the CUTLASS headers.

set(QWEN_SPARSE_CUDA_LIBRARIES)
set(QWEN_SPARSE_CUDA_SOURCES csrc/cuda/unavailable.cpp)
set(QWEN_SPARSE_CUDA_VERSION "")
set(QWEN_SPARSE_CUDA_ARCHS)
set(QWEN_SPARSE_CUDA_DEFINITIONS)
set(QWEN_SPARSE_CUTLASS_VERSION "")

# Must be 0, 1 or auto; also taken from the environment, so that it reaches a build through pip.
if(DEFINED ENV{QWEN_SPARSE_CUDA})
  set(QWEN_SPARSE_CUDA $ENV{QWEN_SPARSE_CUDA})
endif()
if(NOT QWEN_SPARSE_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "qwen_sparse: QWEN_SPARSE_CUDA must be auto, 0 or 1, got '${QWEN_SPARSE_CUDA}'")
endif()
if(QWEN_SPARSE_CUDA STREQUAL "0")
  message(STATUS "qwen_sparse: CUDA off (QWEN_SPARSE_CUDA=0)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(QWEN_SPARSE_CUDA STREQUAL "1")
    message(FATAL_ERROR "qwen_sparse: QWEN_SPARSE_CUDA=1 needs nvcc, which was not found; set CUDACXX to its path")
  endif()
  message(STATUS "qwen_sparse: CUDA off (nvcc not found)")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # set per library
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(QWEN_SPARSE_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})

find_package(CUDAToolkit REQUIRED)
include(cutlass)

function(add_cuda_arch arch architectures)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${ARGN})
  if(NOT sources)
    return()
  endif()
  add_library(qwen_sparse_cuda_${arch} OBJECT ${sources})
  set_target_properties(qwen_sparse_cuda_${arch} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  target_include_directories(qwen_sparse_cuda_${arch} PRIVATE csrc)
  target_compile_options(qwen_sparse_cuda_${arch} PRIVATE -lineinfo --expt-relaxed-constexpr)
  target_link_libraries(qwen_sparse_cuda_${arch} PRIVATE qwen_sparse_cutlass)
  set(QWEN_SPARSE_CUDA_LIBRARIES ${QWEN_SPARSE_CUDA_LIBRARIES} qwen_sparse_cuda_${arch} PARENT_SCOPE)
  set(QWEN_SPARSE_CUDA_ARCHS ${QWEN_SPARSE_CUDA_ARCHS} ${arch} PARENT_SCOPE)
endfunction()

add_cuda_arch(sm80 "80-real;90-real;80-virtual" csrc/cuda/smxx/*.cu csrc/cuda/sm80/*.cu)
if(QWEN_SPARSE_CUTLASS_VERSION)
  add_cuda_arch(sm90 "90a-real" csrc/cuda/sm90/*.cu)
  set(QWEN_SPARSE_CUDA_DEFINITIONS QWEN_SPARSE_SM90)
endif()
set(QWEN_SPARSE_CUDA_SOURCES csrc/cuda/arch.cpp csrc/cuda/attention.cpp csrc/cuda/backend.cpp)
list(APPEND QWEN_SPARSE_CUDA_LIBRARIES CUDA::cudart_static)
message(STATUS "qwen_sparse: CUDA ${QWEN_SPARSE_CUDA_VERSION}, kernels for: ${QWEN_SPARSE_CUDA_ARCHS}")
