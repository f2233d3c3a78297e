// What the files that stand in for libcudart share.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <functional>
#include <string>

#include "core.hpp"

namespace ptxsim {
cudaError_t& last_error();      // of this thread
cudaError_t fail(cudaError_t);  // keeps an error for cudaGetLastError; returns it
int max_shared_memory();        // bytes that a block can opt in to
const GlobalInfo* find_variable(const void* host);
// Runs the work now, or records it if the stream is being captured.
cudaError_t submit(cudaStream_t, std::function<cudaError_t()> work);
bool capturing();  // any stream
}  // namespace ptxsim
