// The compiler vectorises each loop for the instruction set that FREEMERGE_ISA names. Every loop does the
// same roundings in the same order on each of them.
#include "cpu/accumulate_kernels.h"

#include <algorithm>
#include <cmath>

#include "cpu/loops.h"

namespace freemerge {
namespace FREEMERGE_ISA {
namespace {

constexpr int kLanes = 16;  // partial sums, so that a sum vectorises without reordering

template <typename Compute>
void add_magnitudes(const Compute* v, std::int64_t count, double* lanes) {
  double sums[kLanes];
  for (int l = 0; l < kLanes; ++l) sums[l] = lanes[l];
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(std::fabs(v[j + l]));
  }
  for (int l = 0; j + l < count; ++l) sums[l] += static_cast<double>(std::fabs(v[j + l]));
  for (int l = 0; l < kLanes; ++l) lanes[l] = sums[l];
}

template <typename Compute>
void add_squares(const Compute* x, std::int64_t count, double* lanes) {
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int l = 0; l < kLanes; ++l)
      lanes[l] += static_cast<double>(x[j + l]) * static_cast<double>(x[j + l]);
  }
  for (int l = 0; j + l < count; ++l)
    lanes[l] += static_cast<double>(x[j + l]) * static_cast<double>(x[j + l]);
}

double total(const double* lanes) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

template <typename Compute>
void accumulate_range_as(const AccumulateJob& job, std::int64_t begin, std::int64_t count, double* sums) {
  Compute base[kChunk];
  Compute v[kChunk];
  for (int i = 0; i < job.model_count; ++i) sums[i] = 0.0;
  for (std::int64_t offset = 0; offset < count; offset += kChunk) {
    const std::int64_t at = begin + offset;
    const std::int64_t m = std::min(kChunk, count - offset);
    prefetch(job.base, at, m);
    load(job.base, at, m, base);
    for (int i = 0; i < job.model_count; ++i) {
      prefetch(job.models[i], at, m);
      load_difference(job.models[i], base, at, m, v);
      double lanes[kLanes] = {};
      add_magnitudes(v, m, lanes);
      sums[i] += total(lanes);
      if (job.out == nullptr) continue;
      Compute* out = static_cast<Compute*>(job.out) + at;
      const Compute weight = static_cast<Compute>(job.weights[i]);
      if (i == 0) {
        for (std::int64_t j = 0; j < m; ++j) out[j] = weight * v[j];
      } else {
        for (std::int64_t j = 0; j < m; ++j) out[j] += weight * v[j];
      }
    }
  }
}

template <typename Compute>
void add_round_range_as(const AddRoundJob& job, std::int64_t begin, std::int64_t count) {
  Compute base[kChunk];
  Compute sum[kChunk];
  const Compute scale = static_cast<Compute>(job.scale);
  for (std::int64_t offset = 0; offset < count; offset += kChunk) {
    const std::int64_t at = begin + offset;
    const std::int64_t m = std::min(kChunk, count - offset);
    load(job.base, at, m, base);
    load(job.delta, at, m, sum);
    for (std::int64_t j = 0; j < m; ++j) sum[j] = base[j] + scale * sum[j];
    visit_dtype(job.out_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* out = static_cast<T*>(job.out) + at;
      for (std::int64_t j = 0; j < m; ++j) {
        if constexpr (std::is_same_v<T, double>) {
          out[j] = static_cast<double>(sum[j]);
        } else {
          out[j] = round_to<T>(static_cast<float>(sum[j]));
        }
      }
    });
  }
}

template <typename Compute>
double square_sum_range_as(Storage x, std::int64_t begin, std::int64_t count) {
  Compute chunk[kChunk];
  double lanes[kLanes] = {};
  for (std::int64_t offset = 0; offset < count; offset += kChunk) {
    const std::int64_t m = std::min(kChunk, count - offset);
    prefetch(x, begin + offset, m);
    load(x, begin + offset, m, chunk);
    add_squares(chunk, m, lanes);
  }
  return total(lanes);
}

}  // namespace

void accumulate_range(const AccumulateJob& job, std::int64_t begin, std::int64_t count, double* sums) {
  if (job.compute == DType::kFloat64) {
    accumulate_range_as<double>(job, begin, count, sums);
  } else {
    accumulate_range_as<float>(job, begin, count, sums);
  }
}

void add_round_range(const AddRoundJob& job, std::int64_t begin, std::int64_t count) {
  if (job.compute == DType::kFloat64) {
    add_round_range_as<double>(job, begin, count);
  } else {
    add_round_range_as<float>(job, begin, count);
  }
}

double square_sum_range(Storage x, std::int64_t begin, std::int64_t count) {
  return x.dtype == DType::kFloat64 ? square_sum_range_as<double>(x, begin, count)
                                    : square_sum_range_as<float>(x, begin, count);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
