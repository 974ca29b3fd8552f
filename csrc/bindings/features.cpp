#include "cpu/features.h"

#include "bindings/bindings.h"
#include "common/dtype.h"
#include "cpu/huge_pages.h"

namespace freemerge {

void bind_features(pybind11::module_& m) {
  m.attr("DTYPES") = codes(kDTypeNames, &DTypeName::dtype);
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
  m.def(
      "prefer_huge_pages",
      [](std::uintptr_t data, std::size_t bytes) { prefer_huge_pages(pointer<void>(data), bytes); },
      pybind11::arg("data"), pybind11::arg("bytes"));
}

}  // namespace freemerge
