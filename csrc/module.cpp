#include "bindings.h"

PYBIND11_MODULE(_core, m) {
  freemerge::bind_features(m);
  freemerge::bind_filter(m);
}
