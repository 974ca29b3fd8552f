#include "cpu/features.h"

#include "bindings/bindings.h"

namespace freemerge {

void bind_features(pybind11::module_& m) {
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
}

}  // namespace freemerge
