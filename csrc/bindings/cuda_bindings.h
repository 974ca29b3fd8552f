// One bind function per topic of the CUDA module. Pointers are integers; callers keep the memory alive, and
// say on which device and stream to work. The GIL is released around native work.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/array.h"
#include "cuda/device.h"

namespace freemerge::cuda {

void bind_device(pybind11::module_& m);
void bind_filter(pybind11::module_& m);
void bind_vectors(pybind11::module_& m);
void bind_experts(pybind11::module_& m);
void bind_emulation(pybind11::module_& m);  // in tests/emulation

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Array array(Address data, int dtype) { return {pointer<void>(data), to_dtype(dtype)}; }

// Where a call works: the first two arguments after the topic's own.
template <typename Work>
decltype(auto) on_stream(int device, Address stream, Work&& work) {
  const pybind11::gil_scoped_release release;
  const DeviceGuard guard(device);
  return work(reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace freemerge::cuda
