// For every .cu file: CUDA itself or its emulation, and one way to launch a kernel.
#pragma once

#if defined(FREEMERGE_EMULATION)
#include "emulation/device/device.h"
#include "emulation/device/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <string>

#include "cuda/error.h"

namespace freemerge::cuda {

struct Launch {
  Launch(const char* name_, dim3 grid_, dim3 block_, std::size_t shared_, cudaStream_t stream_,
         const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
      : name(name_), grid(grid_), block(block_), shared(shared_), stream(stream_), file(file_), line(line_) {}

  const char* name;
  dim3 grid;
  dim3 block;
  std::size_t shared;  // bytes of dynamic shared memory
  cudaStream_t stream;
  const char* file;
  int line;
};

constexpr std::size_t kSharedForAll = std::size_t{48} << 10;  // what a block may have without asking

// Every kernel takes one plain struct.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Launch& how, const Arguments& arguments) {
  if (how.shared > kSharedForAll) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared)),
          "cudaFuncSetAttribute", how.file, how.line);
  }
#if defined(FREEMERGE_EMULATION)
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  } call{kernel, arguments};
  const auto thread = [](void* p) {
    const auto* c = static_cast<const Call*>(p);
    c->kernel(c->arguments);
  };
  if (!emulation::run_grid(how.grid, how.block, how.shared, thread, &call)) emulation::refuse_launch();
#else
  kernel<<<how.grid, how.block, how.shared, how.stream>>>(arguments);
#endif
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    check(error, (std::string("launch of ") + how.name).c_str(), how.file, how.line);
}

// Dynamic shared memory is the only kind used: its size is part of the launch and its emulation is guarded.
template <typename T>
__device__ T* shared_memory() {
#if defined(FREEMERGE_EMULATION)
  return static_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// Global memory goes through these two, so that the emulation can count it.
template <typename T>
__device__ T load(const T* address) {
#if defined(FREEMERGE_EMULATION)
  emulation::count_load(address, sizeof(T));
#endif
  return *address;
}

template <typename T>
__device__ void store(T* address, T value) {
#if defined(FREEMERGE_EMULATION)
  emulation::count_store(address, sizeof(T));
#endif
  *address = value;
}

}  // namespace freemerge::cuda
