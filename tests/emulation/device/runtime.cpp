// The part of the CUDA runtime that host code calls, on ordinary memory. One device; every stream is in order
// with the host, so there is nothing to wait for.
#include "emulation/device/runtime.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "emulation/device/scheduler.h"

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaError_t device_count_error = cudaSuccess;
thread_local cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

}  // namespace

namespace freemerge::emulation {

void refuse_launch() { last_error = cudaErrorInvalidConfiguration; }

void set_device_count_error(int error) { device_count_error = static_cast<cudaError_t>(error); }

void set_capturing(bool capturing) {
  capture = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

}  // namespace freemerge::emulation

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "emulated error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count_error == cudaSuccess ? 1 : 0;
  return device_count_error == cudaSuccess ? cudaSuccess : fail(device_count_error);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return fail(cudaErrorInvalidValue);
  *value = static_cast<int>(freemerge::emulation::kMaxShared);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return known && value <= static_cast<int>(freemerge::emulation::kMaxShared) ? cudaSuccess
                                                                              : fail(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t) {
  std::memset(destination, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capture;
  return cudaSuccess;
}
