#include <algorithm>
#include <limits>

#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/sparse.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kSparseEntries;
using heuristics::kSparseThreads;
using heuristics::kUpdatesPerLaunch;

constexpr std::int64_t kBlockEntries = kSparseThreads * kSparseEntries;

// The job whose blocks this one is among.
__device__ int job_of_block(const SparseBatch& batch) {
  int least = 0;
  int most = batch.count - 1;
  while (least < most) {
    const int middle = (least + most + 1) / 2;
    if (batch.jobs[middle].first_block <= blockIdx.x) {
      least = middle;
    } else {
      most = middle - 1;
    }
  }
  return least;
}

__device__ std::int64_t index_at(const SparseJob& job, std::int64_t i) {
  return job.wide ? load(static_cast<const std::int64_t*>(job.indices) + i)
                  : load(static_cast<const std::int32_t*>(job.indices) + i);
}

// visit(e, i) for the entries of this thread.
template <typename Visit>
__device__ void for_each_entry(const SparseJob& job, const Visit& visit) {
  const std::int64_t start = (blockIdx.x - job.first_block) * kBlockEntries + threadIdx.x;
#pragma unroll
  for (int e = 0; e < kSparseEntries; ++e) {
    const std::int64_t i = start + e * kSparseThreads;
    if (i < job.count) visit(e, i);
  }
}

// Here and below: all loads are on their way before the first store, which the compiler moves no load across.
template <typename T>
__device__ void apply_entries(const SparseJob& job, char* saved) {
  T* places[kSparseEntries];
  float changes[kSparseEntries];
  T former[kSparseEntries];
  T changed[kSparseEntries];
  for_each_entry(job, [&](int e, std::int64_t i) {
    places[e] = static_cast<T*>(job.weights) + index_at(job, i);
    changes[e] = __fmul_rn(job.scale, load(job.values + i));
  });
  for_each_entry(job, [&](int e, std::int64_t i) {
    former[e] = load(places[e]);
    const T origin = job.origin ? load(static_cast<const T*>(job.origin) + i) : former[e];
    changed[e] = narrow<T>(__fadd_rn(widen(origin), changes[e]));
  });
  for_each_entry(job, [&](int e, std::int64_t i) {
    store(reinterpret_cast<T*>(saved + job.saved) + i, former[e]);
    store(places[e], changed[e]);
  });
}

template <typename T>
__device__ void restore_entries(const SparseJob& job, const char* saved) {
  T* places[kSparseEntries];
  T former[kSparseEntries];
  for_each_entry(job, [&](int e, std::int64_t i) {
    places[e] = static_cast<T*>(job.weights) + index_at(job, i);
    former[e] = load(reinterpret_cast<const T*>(saved + job.saved) + i);
  });
  for_each_entry(job, [&](int e, std::int64_t) { store(places[e], former[e]); });
}

// The dtype is the same for all threads of a block.
__global__ void __launch_bounds__(kSparseThreads) apply_kernel(SparseBatch batch) {
  const SparseJob& job = batch.jobs[job_of_block(batch)];
  if (job.dtype == DType::kFloat32) {
    apply_entries<float>(job, batch.saved);
  } else if (job.dtype == DType::kBFloat16) {
    apply_entries<__nv_bfloat16>(job, batch.saved);
  } else {
    apply_entries<__half>(job, batch.saved);
  }
}

// Bits go back as they are, so only the width of an entry counts.
__global__ void __launch_bounds__(kSparseThreads) restore_kernel(SparseBatch batch) {
  const SparseJob& job = batch.jobs[job_of_block(batch)];
  if (job.dtype == DType::kFloat32) {
    restore_entries<std::uint32_t>(job, batch.saved);
  } else {
    restore_entries<std::uint16_t>(job, batch.saved);
  }
}

void run(const char* name, void (*kernel)(SparseBatch), SparseBatch batch, void* saved, cudaStream_t stream) {
  batch.saved = static_cast<char*>(saved);
  launch(kernel, Launch(name, dim3(batch.blocks), dim3(kSparseThreads), 0, stream), batch);
}

bool overlap(const SparseUpdate& a, const SparseUpdate& b) {
  const auto begin = [](const SparseUpdate& u) { return reinterpret_cast<std::uintptr_t>(u.weights); };
  const auto end = [&](const SparseUpdate& u) {
    return begin(u) + static_cast<std::uintptr_t>(u.n * byte_size(u.dtype));
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

// The end of the updates from `first` on that one launch can make, in any order.
std::size_t end_of_batch(const std::vector<SparseUpdate>& updates, std::size_t first) {
  std::size_t end = first;
  const auto meets = [&](const SparseUpdate& earlier) { return overlap(earlier, updates[end]); };
  const auto at = [&](std::size_t i) { return updates.begin() + static_cast<std::ptrdiff_t>(i); };
  while (end < updates.size() && end - first < kUpdatesPerLaunch && std::none_of(at(first), at(end), meets))
    ++end;
  return end;
}

}  // namespace

SparseSwitch::SparseSwitch(const std::vector<SparseUpdate>& updates) {
  for (std::size_t first = 0; first < updates.size();) {
    const std::size_t end = end_of_batch(updates, first);
    SparseBatch& batch = batches_.emplace_back();
    std::int64_t blocks = 0;
    for (; first < end; ++first) {
      const SparseUpdate& update = updates[first];
      require(update.dtype != DType::kFloat64, "the CUDA backend stores float32, bfloat16 and float16");
      require(update.indices.count > 0, "count must be positive");
      batch.jobs[batch.count++] = {update.weights,
                                   update.indices.data,
                                   update.values,
                                   update.origin,
                                   update.indices.count,
                                   saved_bytes_,
                                   static_cast<unsigned>(blocks),
                                   static_cast<float>(update.scale),
                                   update.dtype,
                                   update.indices.wide};
      blocks += ceil_div(update.indices.count, kBlockEntries);
      require(blocks <= std::numeric_limits<int>::max(), "there are too many entries for one switch");
      saved_bytes_ += update.saved_bytes();
    }
    batch.blocks = static_cast<unsigned>(blocks);
  }
}

void SparseSwitch::apply(void* saved, cudaStream_t stream) const {
  std::size_t done = 0;
  try {
    for (; done < batches_.size(); ++done) run("sparse_apply", apply_kernel, batches_[done], saved, stream);
  } catch (...) {
    restore_first(done, saved, stream);
    throw;
  }
}

void SparseSwitch::restore(void* saved, cudaStream_t stream) const {
  restore_first(batches_.size(), saved, stream);
}

void SparseSwitch::restore_first(std::size_t batches, void* saved, cudaStream_t stream) const {
  while (batches > 0) run("sparse_restore", restore_kernel, batches_[--batches], saved, stream);
}

}  // namespace freemerge::cuda
