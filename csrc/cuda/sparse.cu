#include "cuda/kernel.cuh"

#include <limits>

#include "cuda/launch_math.h"
#include "cuda/sparse.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) apply_kernel(SparseUpdate update) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= update.count) return;
  T* weight = static_cast<T*>(update.weights.data) + load(update.indices + i);
  const T old = load(weight);
  store(static_cast<T*>(update.saved) + i, old);
  const float change = __fmul_rn(update.scale, load_wide(update.values, i));
  store(weight, narrow<T>(update.replace ? change : __fadd_rn(widen(old), change)));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) undo_kernel(SparseUpdate update) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= update.count) return;
  store(static_cast<T*>(update.weights.data) + load(update.indices + i), load(static_cast<const T*>(update.saved) + i));
}

Launch one_thread_each(const char* name, std::int64_t count, cudaStream_t stream, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  const std::int64_t blocks = ceil_div(count, kThreads);
  require(count > 0 && blocks <= std::numeric_limits<int>::max(), "count must be positive and not too large");
  return Launch(name, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, file, line);
}

}  // namespace

void sparse_apply(const SparseUpdate& update, cudaStream_t stream) {
  require_storage(update.values);
  visit_storage(update.weights.dtype, [&](auto tag) {
    launch(apply_kernel<typename decltype(tag)::type>, one_thread_each("sparse_apply", update.count, stream), update);
  });
}

void sparse_undo(const SparseUpdate& update, cudaStream_t stream) {
  visit_storage(update.weights.dtype, [&](auto tag) {
    launch(undo_kernel<typename decltype(tag)::type>, one_thread_each("sparse_undo", update.count, stream), update);
  });
}

}  // namespace freemerge::cuda
