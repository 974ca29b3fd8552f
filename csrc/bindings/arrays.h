// Handing native results to Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/select.h"

namespace freemerge {

// A numpy array that owns the vector, without copying it.
template <typename T>
pybind11::array_t<T> array(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  const auto size = static_cast<pybind11::ssize_t>(owned->size());
  T* const data = owned->data();
  pybind11::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  owned.release();
  return pybind11::array_t<T>(size, data, owner);
}

inline pybind11::tuple arrays(Selection&& selection) {
  return pybind11::make_tuple(array(std::move(selection.indices)), array(std::move(selection.values)));
}

}  // namespace freemerge
