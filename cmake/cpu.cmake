# One object library per CPU instruction set, all from the same sources. The best one is chosen at run time, so a
# build runs on every CPU of its architecture.

set(QWEN_SPARSE_KERNEL_OPTIMIZATION "-O3" CACHE STRING "Optimization level of the CPU kernels")
option(QWEN_SPARSE_EMULATED_AMX "Also build the AMX kernels on emulated tiles, for tests on other CPUs" OFF)

set(cpu_kernel_sources
  csrc/cpu/isa/attention.cpp
  csrc/cpu/isa/decode.cpp
  csrc/cpu/isa/gather.cpp
  csrc/cpu/isa/quantize.cpp
  csrc/cpu/isa/rotary.cpp
  csrc/cpu/isa/select.cpp
  csrc/cpu/isa/select_groups.cpp)

set(QWEN_SPARSE_CPU_LIBRARIES)
set(QWEN_SPARSE_CPU_ISAS)
set(QWEN_SPARSE_CPU_DEFINITIONS)

set(amx_kernel_sources csrc/cpu/amx/attention.cpp csrc/cpu/isa/select_groups.cpp)

function(add_cpu_isa isa)
  add_kernels(${isa} "${cpu_kernel_sources}" -ffp-contract=fast ${ARGN})
  set(QWEN_SPARSE_CPU_LIBRARIES ${QWEN_SPARSE_CPU_LIBRARIES} PARENT_SCOPE)
  set(QWEN_SPARSE_CPU_ISAS ${QWEN_SPARSE_CPU_ISAS} PARENT_SCOPE)
endfunction()

# Kernels on AMX tiles, for what another set does without them. Without contractions they have the same bits emulated.
function(add_amx_isa isa)
  add_kernels(${isa} "${amx_kernel_sources}" -ffp-contract=off -DQWEN_SPARSE_TILES ${ARGN})
  set(QWEN_SPARSE_CPU_LIBRARIES ${QWEN_SPARSE_CPU_LIBRARIES} PARENT_SCOPE)
  set(QWEN_SPARSE_CPU_ISAS ${QWEN_SPARSE_CPU_ISAS} PARENT_SCOPE)
endfunction()

function(add_kernels isa sources)
  add_library(qwen_sparse_cpu_${isa} OBJECT ${sources})
  target_include_directories(qwen_sparse_cpu_${isa} PRIVATE csrc)
  target_compile_definitions(qwen_sparse_cpu_${isa} PRIVATE QWEN_SPARSE_ISA=${isa} ${QWEN_SPARSE_CPU_DEFINITIONS})
  target_compile_options(qwen_sparse_cpu_${isa} PRIVATE
    -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized
    ${QWEN_SPARSE_KERNEL_OPTIMIZATION} -fno-exceptions -fno-math-errno -fno-trapping-math ${ARGN})
  set(QWEN_SPARSE_CPU_LIBRARIES ${QWEN_SPARSE_CPU_LIBRARIES} qwen_sparse_cpu_${isa} PARENT_SCOPE)
  set(QWEN_SPARSE_CPU_ISAS ${QWEN_SPARSE_CPU_ISAS} ${isa} PARENT_SCOPE)
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(QWEN_SPARSE_CPU_DEFINITIONS QWEN_SPARSE_X86)
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  add_cpu_isa(baseline)
  add_cpu_isa(avx2 ${avx2})
  add_cpu_isa(avx512 ${avx512})
  add_cpu_isa(avx512_bf16 ${avx512} -mavx512bf16)
  add_amx_isa(amx ${avx512} -mavx512bf16 -mavx512vbmi)
  if(QWEN_SPARSE_EMULATED_AMX)
    list(APPEND QWEN_SPARSE_CPU_DEFINITIONS QWEN_SPARSE_EMULATED_AMX)
    add_amx_isa(amx_emulated ${avx2} -DQWEN_SPARSE_EMULATED_TILES)
  endif()
else()
  add_cpu_isa(baseline)
endif()
