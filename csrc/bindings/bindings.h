// One bind function per topic, each in its own bind_*.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace freemerge {

void bind_accumulate(pybind11::module_& m);
void bind_features(pybind11::module_& m);
void bind_select(pybind11::module_& m);
void bind_sparse(pybind11::module_& m);
void bind_filter(pybind11::module_& m);

}  // namespace freemerge
