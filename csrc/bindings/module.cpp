#include "bindings/bindings.h"

// Safe without the GIL: all work runs with it released already, on immutable plans and memory of its own or
// of the caller. What calls share is a locked buffer (cpu/buffer.cpp) and statics that are initialised once
// (cpu/features.cpp, cpu/kernels.cpp).
PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  freemerge::bind_features(m);
  freemerge::bind_accumulate(m);
  freemerge::bind_select(m);
  freemerge::bind_sparse(m);
  freemerge::bind_filter(m);
  freemerge::bind_hashing(m);
}
