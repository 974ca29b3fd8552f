#include <limits>

#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/sparse.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;

struct ApplyJob {
  SparseUpdate update;
  const float* values;
  float scale;
  const void* origin;
};

__device__ std::int64_t index_at(const SparseUpdate& update, std::int64_t i) {
  return update.wide ? load(static_cast<const std::int64_t*>(update.indices) + i)
                     : load(static_cast<const std::int32_t*>(update.indices) + i);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) apply_kernel(ApplyJob job) {
  const SparseUpdate& update = job.update;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= update.count) return;
  T* weight = static_cast<T*>(update.weights.data) + index_at(update, i);
  const T old = load(weight);
  store(static_cast<T*>(update.saved) + i, old);
  const T start = job.origin ? load(static_cast<const T*>(job.origin) + i) : old;
  store(weight, narrow<T>(__fadd_rn(widen(start), __fmul_rn(job.scale, load(job.values + i)))));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) restore_kernel(SparseUpdate update) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= update.count) return;
  const T saved = load(static_cast<const T*>(update.saved) + i);
  store(static_cast<T*>(update.weights.data) + index_at(update, i), saved);
}

Launch one_thread_each(const char* name, std::int64_t count, cudaStream_t stream,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const std::int64_t blocks = ceil_div(count, kThreads);
  require(count > 0 && blocks <= std::numeric_limits<int>::max(), "count must be positive and not too large");
  return Launch(name, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, file, line);
}

}  // namespace

void sparse_apply(const SparseUpdate& update, const float* values, float scale, const void* origin,
                  cudaStream_t stream) {
  visit_storage(update.weights.dtype, [&](auto tag) {
    launch(apply_kernel<typename decltype(tag)::type>, one_thread_each("sparse_apply", update.count, stream),
           ApplyJob{update, values, scale, origin});
  });
}

void sparse_restore(const SparseUpdate& update, cudaStream_t stream) {
  visit_storage(update.weights.dtype, [&](auto tag) {
    launch(restore_kernel<typename decltype(tag)::type>,
           one_thread_each("sparse_restore", update.count, stream), update);
  });
}

}  // namespace freemerge::cuda
