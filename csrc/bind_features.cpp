#include "bindings.h"
#include "cpu/features.h"

namespace freemerge {

void bind_features(pybind11::module_& m) {
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
}

}  // namespace freemerge
