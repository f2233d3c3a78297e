"""A functional simulator that runs CUDA kernels on the CPU, from the PTX that nvcc emits; see README.md."""
