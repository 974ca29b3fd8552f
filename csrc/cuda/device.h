// The device that host code and launches of this thread refer to.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/error.h"

namespace freemerge::cuda {

// Makes a device current for a scope. torch links another copy of the CUDA runtime, so its choice isn't ours.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace freemerge::cuda
