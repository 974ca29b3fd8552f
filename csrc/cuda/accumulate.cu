#include <algorithm>
#include <limits>

#include "cuda/accumulate.cuh"
#include "cuda/heuristics.h"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"
#include "cuda/weighted_sum.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kSumThreads;

constexpr std::int64_t kBlockEntries = kSumThreads * kEntries;
constexpr int kWarps = kSumThreads / kWarpSize;

struct SumJob {
  Array out;  // float; no data: only magnitudes are wanted
  TaskVectors vectors;
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
  float sum[kEntries] = {};
  if (job.out.data && !job.first) widen(fetch(job.out, first, job.n), DType::kFloat32, sum);
  add_weighted(job.vectors, first, job.n, job.first, sum, [&](int m, double magnitudes) {
    magnitudes = warp_sum(magnitudes);
    if (threadIdx.x % kWarpSize == 0)
      scratch[m * kWarps + static_cast<int>(threadIdx.x) / kWarpSize] = magnitudes;
  });
  if (job.out.data) store_entries(job.out, first, job.n, sum);
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x);
  if (m >= job.vectors.count) return;
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[m * kWarps + warp];
  store(job.partial + static_cast<std::int64_t>(m) * gridDim.x + blockIdx.x, total);
}

struct AverageJob {
  const double* partial;
  std::int64_t blocks;
  std::int64_t n;
  double* averages;
};

__global__ void __launch_bounds__(kSumThreads) average_kernel(AverageJob job) {
  double* scratch = shared_memory<double>();
  const double* partial = job.partial + blockIdx.x * job.blocks;
  double sum = 0.0;
  for (std::int64_t b = threadIdx.x; b < job.blocks; b += kSumThreads) sum += load(partial + b);
  const double total = block_sum(sum, scratch);
  if (threadIdx.x == 0) store(job.averages + blockIdx.x, total / static_cast<double>(job.n));
}

struct AddJob {
  Array out;
  Array base;
  Array delta;
  float scale;
  float factor;
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
  for (int e = 0; e < kEntries; ++e)
    base[e] = __fadd_rn(base[e], __fmul_rn(job.scale, __fmul_rn(job.factor, delta[e])));
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
    job.first = begin == 0;
    job.n = n;
    job.partial = scratch;
    job.vectors.base = base;
    const int count = static_cast<int>(std::min<std::size_t>(kModelsPerLaunch, models.size() - begin));
    job.vectors.count = count;
    for (int m = 0; m < count; ++m) {
      const std::size_t i = begin + static_cast<std::size_t>(m);
      job.vectors.models[m] = models[i];
      job.vectors.weights[m] = out ? static_cast<float>(weights[i]) : 0.0f;
    }
    const dim3 grid(blocks(n));
    launch(sum_kernel, Launch("sum", grid, dim3(kSumThreads), kModelsPerLaunch * kScratchBytes, stream), job);
    average(scratch, count, grid.x, n, means + begin, stream);
  }
}

void average(const double* partial, int rows, std::int64_t blocks, std::int64_t n, double* averages,
             cudaStream_t stream) {
  const AverageJob job{partial, blocks, n, averages};
  launch(average_kernel,
         Launch("average", dim3(static_cast<unsigned>(rows)), dim3(kSumThreads), kScratchBytes, stream), job);
}

void finish_sum(const SumFirst& sum, const Parts& sums, std::int64_t n, const Parts& energies,
                cudaStream_t stream) {
  const int models = sum.vectors.count;
  average(sums.data, models, sums.count, n, sum.results, stream);
  average(sums.data + models * sums.count, 1, sums.count, 1, sum.results + models, stream);
  average(energies.data, 1, energies.count, 1, sum.results + models + 1, stream);
}

void add_round(const Array& out, const Array& base, const Array& delta, double scale, double factor,
               std::int64_t n, cudaStream_t stream) {
  require(n > 0, "n must be positive");
  require_storage(out);
  require_storage(base);
  require_storage(delta);
  const AddJob job{out, base, delta, static_cast<float>(scale), static_cast<float>(factor), n};
  launch(add_kernel, Launch("add_round", dim3(blocks(n)), dim3(kSumThreads), 0, stream), job);
}

}  // namespace freemerge::cuda
