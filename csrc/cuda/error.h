// Errors of the CUDA runtime, of cuFFT and of kernel launches, with the operation and where it was issued.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace freemerge::cuda {

struct Error : std::runtime_error {
  Error(const std::string& operation, const std::string& reason, int code, const char* file, int line);

  std::string operation;  // "cudaSetDevice", "cufftExecR2C", "launch of spread_rows"
  int code;               // cudaError_t or cufftResult; 0 where the failure has no code
  std::string file;
  int line;
};

// __builtin_FILE as a default argument names the caller's line.
void check(cudaError_t error, const char* operation, const char* file = __builtin_FILE(),
           int line = __builtin_LINE());

void check_cufft(int result, const char* operation, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE());

}  // namespace freemerge::cuda
