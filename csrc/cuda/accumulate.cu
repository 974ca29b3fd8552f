#include <algorithm>
#include <limits>

#include "cuda/accumulate.cuh"
#include "cuda/entries.cuh"
#include "cuda/heuristics.h"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kSumThreads;

constexpr std::int64_t kBlockEntries = kSumThreads * kEntries;
constexpr int kModelsPerLaunch = 16;
constexpr int kWarps = kSumThreads / kWarpSize;

struct SumJob {
  Array out;  // float; no data: only magnitudes are wanted
  Array base;
  Array models[kModelsPerLaunch];
  float weights[kModelsPerLaunch];
  int count;
  bool first;  // out has no earlier models' sum in it
  std::int64_t n;
  double* partial;  // partial[model][block]
};

__device__ std::int64_t first_entry() {
  return (static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kEntries;
}

__global__ void __launch_bounds__(kSumThreads) sum_kernel(SumJob job) {
  double* scratch = shared_memory<double>();  // scratch[model][warp]
  const std::int64_t first = first_entry();
  StoredEntries next = fetch(job.models[0], first, job.n);
  float base[kEntries];
  widen(fetch(job.base, first, job.n), job.base.dtype, base);
  float sum[kEntries] = {};
  if (job.out.data && !job.first) widen(fetch(job.out, first, job.n), DType::kFloat32, sum);
#pragma unroll 1
  for (int m = 0; m < job.count; ++m) {
    float entries[kEntries];
    const StoredEntries stored = next;
    if (m + 1 < job.count) next = fetch(job.models[m + 1], first, job.n);  // on its way during the arithmetic
    widen(stored, job.models[m].dtype, entries);
    double magnitudes = 0.0;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const float v = __fsub_rn(entries[e], base[e]);  // 0 beyond the end
      magnitudes += static_cast<double>(fabsf(v));
      const float weighted = __fmul_rn(job.weights[m], v);
      sum[e] = job.first && m == 0 ? weighted : __fadd_rn(sum[e], weighted);
    }
    magnitudes = warp_sum(magnitudes);
    if (threadIdx.x % kWarpSize == 0)
      scratch[m * kWarps + static_cast<int>(threadIdx.x) / kWarpSize] = magnitudes;
  }
  if (job.out.data) store_entries(job.out, first, job.n, sum);
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x);
  if (m >= job.count) return;
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[m * kWarps + warp];
  store(job.partial + static_cast<std::int64_t>(m) * gridDim.x + blockIdx.x, total);
}

struct MeanJob {
  const double* partial;
  std::int64_t blocks;
  std::int64_t n;
  double* means;
};

__global__ void __launch_bounds__(kSumThreads) mean_kernel(MeanJob job) {
  double* scratch = shared_memory<double>();
  const double* partial = job.partial + blockIdx.x * job.blocks;
  double sum = 0.0;
  for (std::int64_t b = threadIdx.x; b < job.blocks; b += kSumThreads) sum += load(partial + b);
  const double total = block_sum(sum, scratch);
  if (threadIdx.x == 0) store(job.means + blockIdx.x, total / static_cast<double>(job.n));
}

struct AddJob {
  Array out;
  Array base;
  Array delta;
  float scale;
  std::int64_t n;
};

__global__ void __launch_bounds__(kSumThreads) add_kernel(AddJob job) {
  const std::int64_t first = first_entry();
  const StoredEntries stored_base = fetch(job.base, first, job.n);
  const StoredEntries stored_delta = fetch(job.delta, first, job.n);
  float base[kEntries];
  float delta[kEntries];
  widen(stored_base, job.base.dtype, base);
  widen(stored_delta, job.delta.dtype, delta);
#pragma unroll
  for (int e = 0; e < kEntries; ++e) base[e] = __fadd_rn(base[e], __fmul_rn(job.scale, delta[e]));
  store_entries(job.out, first, job.n, base);
}

unsigned blocks(std::int64_t n) {
  const std::int64_t count = ceil_div(n, kBlockEntries);
  require(count <= std::numeric_limits<int>::max(), "n is too large");
  return static_cast<unsigned>(count);
}

constexpr std::size_t kScratchBytes = kWarps * sizeof(double);

}  // namespace

std::int64_t accumulate_scratch(std::int64_t n, std::int64_t models) {
  return ceil_div(n, kBlockEntries) * std::min<std::int64_t>(models, kModelsPerLaunch);
}

void accumulate(float* out, const Array& base, const std::vector<Array>& models,
                const std::vector<double>& weights, std::int64_t n, double* means, double* scratch,
                cudaStream_t stream) {
  require(n > 0, "n must be positive");
  require(!models.empty(), "models must not be empty");
  require(out == nullptr || weights.size() == models.size(), "weights must hold one number per model");
  require_storage(base);
  for (const Array& model : models) require_storage(model);
  for (std::size_t begin = 0; begin < models.size(); begin += kModelsPerLaunch) {
    SumJob job{};
    job.out = {out, DType::kFloat32};
    job.base = base;
    job.first = begin == 0;
    job.n = n;
    job.partial = scratch;
    job.count = static_cast<int>(std::min<std::size_t>(kModelsPerLaunch, models.size() - begin));
    for (std::size_t m = 0; m < static_cast<std::size_t>(job.count); ++m) {
      job.models[m] = models[begin + m];
      job.weights[m] = out ? static_cast<float>(weights[begin + m]) : 0.0f;
    }
    const dim3 grid(blocks(n));
    launch(sum_kernel, Launch("sum", grid, dim3(kSumThreads), kModelsPerLaunch * kScratchBytes, stream), job);
    const MeanJob mean{scratch, grid.x, n, means + begin};
    launch(mean_kernel,
           Launch("mean", dim3(static_cast<unsigned>(job.count)), dim3(kSumThreads), kScratchBytes, stream),
           mean);
  }
}

void add_round(const Array& out, const Array& base, const Array& delta, double scale, std::int64_t n,
               cudaStream_t stream) {
  require(n > 0, "n must be positive");
  require_storage(out);
  require_storage(base);
  require_storage(delta);
  const AddJob job{out, base, delta, static_cast<float>(scale), n};
  launch(add_kernel, Launch("add_round", dim3(blocks(n)), dim3(kSumThreads), 0, stream), job);
}

}  // namespace freemerge::cuda
