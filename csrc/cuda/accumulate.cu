#include <algorithm>
#include <limits>

#include "cuda/accumulate.cuh"
#include "cuda/heuristics.h"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kSumEntries;
using heuristics::kSumThreads;

constexpr std::int64_t kBlockEntries = kSumThreads * kSumEntries;
constexpr int kModelsPerLaunch = 16;

struct SumJob {
  float* out;
  Array base;
  Array models[kModelsPerLaunch];
  float weights[kModelsPerLaunch];
  int count;
  bool first;  // out has no earlier models' sum in it
  std::int64_t n;
  double* partial;  // partial[model][block]
};

__global__ void __launch_bounds__(kSumThreads) sum_kernel(SumJob job) {
  double* scratch = shared_memory<double>();
  const std::int64_t start = blockIdx.x * kBlockEntries + threadIdx.x;
  float base[kSumEntries];
  float sum[kSumEntries];
#pragma unroll
  for (int e = 0; e < kSumEntries; ++e) {
    const std::int64_t i = start + e * kSumThreads;
    const bool inside = i < job.n;
    base[e] = inside ? load_wide(job.base, i) : 0.0f;
    sum[e] = inside && job.out && !job.first ? load(job.out + i) : 0.0f;
  }
  for (int m = 0; m < job.count; ++m) {
    double magnitudes = 0.0;
#pragma unroll
    for (int e = 0; e < kSumEntries; ++e) {
      const std::int64_t i = start + e * kSumThreads;
      const float v = i < job.n ? __fsub_rn(load_wide(job.models[m], i), base[e]) : 0.0f;
      magnitudes += static_cast<double>(fabsf(v));
      const float weighted = __fmul_rn(job.weights[m], v);
      sum[e] = job.first && m == 0 ? weighted : __fadd_rn(sum[e], weighted);
    }
    __syncthreads();  // the scratch of the previous model has been read
    const double total = block_sum(magnitudes, scratch);
    if (threadIdx.x == 0) store(job.partial + static_cast<std::int64_t>(m) * gridDim.x + blockIdx.x, total);
  }
  if (!job.out) return;
#pragma unroll
  for (int e = 0; e < kSumEntries; ++e) {
    const std::int64_t i = start + e * kSumThreads;
    if (i < job.n) store(job.out + i, sum[e]);
  }
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
  const std::int64_t start = blockIdx.x * kBlockEntries + threadIdx.x;
#pragma unroll
  for (int e = 0; e < kSumEntries; ++e) {
    const std::int64_t i = start + e * kSumThreads;
    if (i >= job.n) return;
    const float scaled = __fmul_rn(job.scale, load_wide(job.delta, i));
    store_narrow(job.out, i, __fadd_rn(load_wide(job.base, i), scaled));
  }
}

unsigned blocks(std::int64_t n) {
  const std::int64_t count = ceil_div(n, kBlockEntries);
  require(count <= std::numeric_limits<int>::max(), "n is too large");
  return static_cast<unsigned>(count);
}

constexpr std::size_t kScratchBytes = kSumThreads / kWarpSize * sizeof(double);

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
    job.out = out;
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
    launch(sum_kernel, Launch("sum", grid, dim3(kSumThreads), kScratchBytes, stream), job);
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
