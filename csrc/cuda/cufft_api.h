// cuFFT, opened at run time: its wheel, the toolkit's copy or the one torch has loaded will all do, and a
// machine without it can still build and import freemerge. The declarations mirror cufft.h; cufft_api.cpp
// checks them against the real header wherever there is one at build time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <vector>

namespace freemerge::cuda::cufft {

using Handle = int;
using Result = int;  // cufftResult
using Type = int;    // cufftType
using Size = long long;

constexpr Type kR2C = 0x2a;
constexpr Type kC2R = 0x2c;

struct Api {
  Result (*Create)(Handle*);
  Result (*Destroy)(Handle);
  Result (*SetAutoAllocation)(Handle, int);
  Result (*SetWorkArea)(Handle, void*);
  Result (*SetStream)(Handle, cudaStream_t);
  Result (*MakePlanMany64)(Handle, int, Size*, Size*, Size, Size, Size*, Size, Size, Type, Size,
                           std::size_t*);
  Result (*ExecR2C)(Handle, float*, float2*);
  Result (*ExecC2R)(Handle, float2*, float*);
  Result (*GetVersion)(int*);
};

// Searched in this order: the file named by FREEMERGE_CUFFT, a copy the process has loaded already (torch's),
// the files in `paths`, the loader's own search. The first success is kept for the life of the process.
// Throws Error, saying what was tried. Thread-safe.
void open(const std::vector<std::string>& paths);

const Api& api();        // opens with no paths if nothing is open
std::string location();  // file of the open library

}  // namespace freemerge::cuda::cufft
