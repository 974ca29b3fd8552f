#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/pack.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPairs = 2;  // of each thread
constexpr std::int64_t kMaxBlocks = 65535;

// Calls visit(pair of the matrix, pair of the row in the spectra, access) for every pair of the rows.
template <typename T, typename Visit>
__device__ void for_each_pair(const RowCopy& a, Visit visit) {
  for (std::int64_t i = blockIdx.y; i < a.row_count; i += gridDim.y) {
    const auto [index, row] = split(a.row_begin + i, a.spectra.height);
    T* matrix = static_cast<T*>(a.matrices.data[index]);
    const std::int64_t stride = a.matrices.row_stride[index];
    float2* line = a.spectra.data + (a.row_begin + i) * a.spectra.pitch;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const std::int64_t pair =
          (static_cast<std::int64_t>(blockIdx.x) * kPairs + p) * kThreads + static_cast<int>(threadIdx.x);
      if (2 * pair >= a.spectra.width) break;
      visit(matrix + row * stride + 2 * pair, line + pair,
            pair_access(matrix, stride, 2 * pair, a.spectra.width));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(RowCopy a) {
  for_each_pair<T>(a, [](const T* entry, float2* wide, PairAccess access) {
    store(wide, widen(load_pair(entry, access)));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpack_kernel(RowCopy a) {
  for_each_pair<T>(
      a, [](T* entry, const float2* wide, PairAccess access) { store_pair(entry, access, load(wide)); });
}

Launch row_copy(const char* name, const RowCopy& a, cudaStream_t stream, const char* file = __builtin_FILE(),
                int line = __builtin_LINE()) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.spectra.width, 2 * kPairs * kThreads)),
                  static_cast<unsigned>(std::min(a.row_count, kMaxBlocks)));
  return Launch(name, grid, dim3(kThreads), 0, stream, file, line);
}

}  // namespace

void pack(const RowCopy& arguments, cudaStream_t stream) {
  const Launch how = row_copy("pack", arguments, stream);
  visit_storage(arguments.matrices.dtype,
                [&](auto tag) { launch(pack_kernel<typename decltype(tag)::type>, how, arguments); });
}

void unpack(const RowCopy& arguments, cudaStream_t stream) {
  const Launch how = row_copy("unpack", arguments, stream);
  visit_storage(arguments.matrices.dtype,
                [&](auto tag) { launch(unpack_kernel<typename decltype(tag)::type>, how, arguments); });
}

}  // namespace freemerge::cuda
