// One bind function per topic, each in the file of that name, and what they share. Pointers are integers;
// callers keep the memory alive. Bindings convert arguments and release the GIL for all that takes time,
// nothing else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/error.h"

namespace freemerge {

void bind_accumulate(pybind11::module_& m);
void bind_features(pybind11::module_& m);
void bind_filter(pybind11::module_& m);
void bind_hashing(pybind11::module_& m);
void bind_select(pybind11::module_& m);
void bind_sparse(pybind11::module_& m);

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The memory of `count` elements: tensors that have none of their own must not get to a kernel.
template <typename T>
T* memory(std::uintptr_t address, std::int64_t count) {
  require(address != 0 || count == 0, "a tensor has no memory: its address is null");
  return pointer<T>(address);
}

// The values of an enum by name, from its list.
template <typename Named, std::size_t n, typename Code>
pybind11::dict codes(const Named (&list)[n], Code Named::* code) {
  pybind11::dict result;
  for (const Named& entry : list) result[entry.name] = static_cast<int>(entry.*code);
  return result;
}

// The entry of such a list that has this name.
template <typename Named, std::size_t n>
const Named& named(const Named (&list)[n], const std::string& name, const char* what) {
  for (const Named& entry : list) {
    if (name == entry.name) return entry;
  }
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

template <typename Work>
auto without_gil(const Work& work) {
  const pybind11::gil_scoped_release release;
  return work();
}

}  // namespace freemerge
