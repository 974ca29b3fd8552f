#include "bindings/cuda_bindings.h"

// Built as _cuda by nvcc, and as _cuda_emulated from the same sources for tests.
PYBIND11_MODULE(FREEMERGE_CUDA_MODULE, m) {
  freemerge::cuda::bind_device(m);
  freemerge::cuda::bind_filter(m);
  freemerge::cuda::bind_vectors(m);
  freemerge::cuda::bind_experts(m);
#if defined(FREEMERGE_EMULATION)
  freemerge::cuda::bind_emulation(m);
#endif
}
