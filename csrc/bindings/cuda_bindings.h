// One bind function per topic of the CUDA module; callers also say on which device and stream to work.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/bindings.h"
#include "cuda/array.h"
#include "cuda/device.h"

namespace freemerge::cuda {

void bind_device(pybind11::module_& m);
void bind_filter(pybind11::module_& m);
void bind_vectors(pybind11::module_& m);
void bind_experts(pybind11::module_& m);
void bind_emulation(pybind11::module_& m);  // in tests/emulation

using Address = std::uintptr_t;

inline Array array(Address data, int dtype, std::int64_t n) {
  return {memory<void>(data, n), to_dtype(dtype)};
}

// Where a call works: the first two arguments after the topic's own.
template <typename Work>
auto on_stream(int device, Address stream, Work&& work) {
  return without_gil([&] {
    const DeviceGuard guard(device);
    return work(reinterpret_cast<cudaStream_t>(stream));
  });
}

}  // namespace freemerge::cuda
