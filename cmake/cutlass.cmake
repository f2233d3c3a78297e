# Defines qwen_sparse_cutlass: the CUTLASS/CuTe headers, from QWEN_SPARSE_CUTLASS_DIR or from the nvidia-cutlass wheel.
# They are never downloaded; without them the target is empty and kernels for Hopper are not built.

set(cutlass_include ${QWEN_SPARSE_CUTLASS_DIR})
if(DEFINED ENV{QWEN_SPARSE_CUTLASS_DIR})
  set(cutlass_include $ENV{QWEN_SPARSE_CUTLASS_DIR})
endif()
if(cutlass_include AND NOT IS_ABSOLUTE "${cutlass_include}")  # a build runs somewhere else than its caller
  message(FATAL_ERROR "qwen_sparse: QWEN_SPARSE_CUTLASS_DIR must be an absolute path, got '${cutlass_include}'")
endif()
if(NOT cutlass_include)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE cutlass_library
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(cutlass_library)
    set(cutlass_include ${cutlass_library}/source/include)
  endif()
endif()

add_library(qwen_sparse_cutlass INTERFACE)
if(NOT cutlass_include)
  message(WARNING "qwen_sparse: no kernels for Hopper: CUTLASS headers not found (pip install --no-deps nvidia-cutlass==4.2.0.0, or set QWEN_SPARSE_CUTLASS_DIR)")
  return()
endif()
if(NOT EXISTS ${cutlass_include}/cutlass/version.h)
  message(FATAL_ERROR "qwen_sparse: no cutlass/version.h under the CUTLASS include directory ${cutlass_include}")
endif()
foreach(part MAJOR MINOR PATCH)
  file(STRINGS ${cutlass_include}/cutlass/version.h line REGEX "#define CUTLASS_${part} ")
  string(REGEX MATCH "[0-9]+" cutlass_${part} "${line}")
endforeach()
set(QWEN_SPARSE_CUTLASS_VERSION ${cutlass_MAJOR}.${cutlass_MINOR}.${cutlass_PATCH})
target_include_directories(qwen_sparse_cutlass SYSTEM INTERFACE ${cutlass_include})
message(STATUS "qwen_sparse: CUTLASS ${QWEN_SPARSE_CUTLASS_VERSION}")
