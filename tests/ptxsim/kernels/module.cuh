// What module_a.cu and module_b.cu have in common, each in its own copy but for the template.
template <int kFactor>
__global__ void scale_k(int* out) {
  out[threadIdx.x] *= kFactor;
}
