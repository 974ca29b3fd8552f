#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  freemerge::bind_features(m);
  freemerge::bind_accumulate(m);
  freemerge::bind_select(m);
  freemerge::bind_sparse(m);
  freemerge::bind_filter(m);
  freemerge::bind_hashing(m);
}
