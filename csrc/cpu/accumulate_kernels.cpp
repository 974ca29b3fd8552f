// Compiled once for every instruction set. Each of them does the same roundings in the same order.
#include "cpu/accumulate_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/loops.h"
#include "cpu/simd.h"

namespace freemerge {
namespace FREEMERGE_ISA {
namespace {

constexpr int kGroup = 16;  // entries: each is added to a partial sum of its own, whatever the vectors are
constexpr int kGroups = FREEMERGE_VECTOR_BYTES >= 32 ? 4 : 2;  // at a time, in registers as far as they go
constexpr std::int64_t kStep = kGroups * kGroup;
constexpr int kModels = 16;  // whose partial sums are kept

// A group in the type of the arithmetic.
template <typename Compute>
struct Group {
  static constexpr int kParts = kGroup / kLanes<Compute>;
  Vec<Compute> part[kParts];
};

FM_INLINE Group<double> to_double(const Group<float>& group) {
  Group<double> wide;
#pragma GCC unroll 8
  for (int i = 0; i < Group<float>::kParts; ++i) widen(group.part[i], wide.part[2 * i], wide.part[2 * i + 1]);
  return wide;
}
FM_INLINE Group<double> to_double(const Group<double>& group) { return group; }
FM_INLINE Group<float> to_float(const Group<double>& group) {
  Group<float> narrow;
#pragma GCC unroll 8
  for (int i = 0; i < Group<float>::kParts; ++i)
    narrow.part[i] = FREEMERGE_ISA::narrow(group.part[2 * i], group.part[2 * i + 1]);
  return narrow;
}
FM_INLINE Group<float> to_float(const Group<float>& group) { return group; }

template <typename Own, typename Compute>
FM_INLINE Group<Own> converted(const Group<Compute>& group) {
  if constexpr (std::is_same_v<Own, double>) {
    return to_double(group);
  } else {
    return to_float(group);
  }
}

// Vectors of a step's entries, the first of which is `at`: all of them, or `count` and zeros behind these.
struct AllEntries {
  template <typename T>
  FM_INLINE auto load(const T* in, std::int64_t) const {
    return FREEMERGE_ISA::load(in);
  }
  template <typename T>
  FM_INLINE void store(T* out, std::int64_t, Vec<Arithmetic<T>> v) const {
    FREEMERGE_ISA::store(out, v);
  }
};
struct FirstEntries {
  std::int64_t count;

  FM_INLINE std::int64_t of(std::int64_t at, std::int64_t lanes) const {
    return std::clamp<std::int64_t>(count - at, 0, lanes);
  }
  template <typename T>
  FM_INLINE auto load(const T* in, std::int64_t at) const {
    return load_partial(in, of(at, kLanes<Arithmetic<T>>));
  }
  template <typename T>
  FM_INLINE void store(T* out, std::int64_t at, Vec<Arithmetic<T>> v) const {
    store_partial(out, v, of(at, kLanes<Arithmetic<T>>));
  }
};

// Entries [at, at + kStep) of an array.
template <typename T, typename Compute, typename Entries>
FM_INLINE void load_groups_of(const void* data, std::int64_t at, Entries entries,
                              Group<Compute> (&out)[kGroups]) {
  using Own = Arithmetic<T>;
  const T* const in = static_cast<const T*>(data) + at;
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 8
    for (int i = 0; i < Group<Own>::kParts; ++i) {
      const std::int64_t offset = g * kGroup + i * kLanes<Own>;
      const Vec<Own> v = entries.load(in + offset, offset);
      if constexpr (std::is_same_v<Compute, Own>) {
        out[g].part[i] = v;
      } else {
        widen(v, out[g].part[2 * i], out[g].part[2 * i + 1]);
      }
    }
  }
}

template <typename Compute, typename Entries>
FM_INLINE void load_groups(Storage source, std::int64_t at, Entries entries, Group<Compute> (&out)[kGroups]) {
  if constexpr (std::is_same_v<Compute, double>) {
    if (source.dtype == DType::kFloat64) return load_groups_of<double>(source.data, at, entries, out);
  }
  if (source.dtype == DType::kBFloat16) return load_groups_of<bfloat16>(source.data, at, entries, out);
  if (source.dtype == DType::kFloat16) return load_groups_of<float16>(source.data, at, entries, out);
  load_groups_of<float>(source.data, at, entries, out);
}

// One NaN for all: the rounding to 16 bits is for those whose low bits are zero.
template <typename T, typename V>
FM_INLINE V with_one_nan(V v) {
  if constexpr (sizeof(T) == 2) {
    const WordVec nan = WordVec{} + 0x7fc00000u;
    return bit_cast<V>(select(bit_cast<WordVec>(v != v), nan, bit_cast<WordVec>(v)));
  } else {
    return v;
  }
}

template <typename T, typename Compute, typename Entries>
FM_INLINE void store_groups_of(void* data, std::int64_t at, Entries entries,
                               const Group<Compute> (&groups)[kGroups]) {
  using Own = Arithmetic<T>;
  T* const out = static_cast<T*>(data) + at;
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const Group<Own> own = converted<Own>(groups[g]);
#pragma GCC unroll 8
    for (int i = 0; i < Group<Own>::kParts; ++i) {
      const std::int64_t offset = g * kGroup + i * kLanes<Own>;
      entries.store(out + offset, offset, with_one_nan<T>(own.part[i]));
    }
  }
}

template <typename Compute, typename Entries>
FM_INLINE void store_groups(void* data, DType dtype, std::int64_t at, Entries entries,
                            const Group<Compute> (&groups)[kGroups]) {
  if (dtype == DType::kBFloat16) return store_groups_of<bfloat16>(data, at, entries, groups);
  if (dtype == DType::kFloat16) return store_groups_of<float16>(data, at, entries, groups);
  if (dtype == DType::kFloat64) return store_groups_of<double>(data, at, entries, groups);
  store_groups_of<float>(data, at, entries, groups);
}

struct PartialSums {
  Group<double> sums;

  FM_INLINE void add(const Group<double>& terms) {
#pragma GCC unroll 8
    for (int i = 0; i < Group<double>::kParts; ++i) sums.part[i] += terms.part[i];
  }
  double total() const {
    double lanes[kGroup];
    __builtin_memcpy(lanes, &sums, sizeof lanes);
    for (int half = kGroup / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
  }
};

template <typename Compute>
FM_INLINE Group<Compute> magnitudes(const Group<Compute>& group) {
  using Word = std::conditional_t<sizeof(Compute) == 8, std::uint64_t, std::uint32_t>;
  Group<Compute> result;
#pragma GCC unroll 8
  for (int i = 0; i < Group<Compute>::kParts; ++i)
    result.part[i] = bit_cast<Vec<Compute>>(bit_cast<Vec<Word>>(group.part[i]) & (~Word{0} >> 1));
  return result;
}

// What a first term is added to without a change: 0 + -0 is 0.
template <typename Compute>
FM_INLINE Group<Compute> negative_zeros() {
  Group<Compute> zeros;
#pragma GCC unroll 8
  for (Vec<Compute>& part : zeros.part) part = -Vec<Compute>{};
  return zeros;
}

template <typename Compute>
FM_INLINE void add_squares(const Group<Compute> (&groups)[kGroups], PartialSums& sums) {
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    Group<double> wide = to_double(groups[g]);
#pragma GCC unroll 8
    for (int i = 0; i < Group<double>::kParts; ++i) wide.part[i] *= wide.part[i];
    sums.add(wide);
  }
}

// Models [first, first + models): partial[m] += |v|, and out += weight * v if there is an `out`, whose
// squares are added to *squares unless that is null.
template <typename Compute, typename Entries>
FM_INLINE void accumulate_step(const AccumulateJob& job, std::int64_t at, Entries entries, int first,
                               int models, PartialSums* partial, PartialSums* squares) {
  Group<Compute> base[kGroups], sum[kGroups];
  prefetch(job.base, at, kStep);
  load_groups(job.base, at, entries, base);
  if (job.out != nullptr && first > 0) {
    load_groups(Storage{job.out, job.compute}, at, entries, sum);
  } else {
    for (Group<Compute>& group : sum) group = negative_zeros<Compute>();
  }
  for (int m = 0; m < models; ++m) {
    const Storage model = job.models[first + m];
    prefetch(model, at, kStep);
    Group<Compute> v[kGroups];
    load_groups(model, at, entries, v);
    const Compute weight = job.out == nullptr ? Compute{0} : static_cast<Compute>(job.weights[first + m]);
    PartialSums own = partial[m];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 8
      for (int i = 0; i < Group<Compute>::kParts; ++i) v[g].part[i] -= base[g].part[i];
      own.add(to_double(magnitudes(v[g])));
#pragma GCC unroll 8
      for (int i = 0; i < Group<Compute>::kParts; ++i) sum[g].part[i] += v[g].part[i] * weight;
    }
    partial[m] = own;
  }
  if (job.out != nullptr) store_groups_of<Compute>(job.out, at, entries, sum);
  if (squares != nullptr) add_squares(sum, *squares);
}

template <typename Compute>
void accumulate_range_as(const AccumulateJob& job, std::int64_t begin, std::int64_t count, double* sums,
                         double* squares) {
  for (int first = 0; first < job.model_count; first += kModels) {
    const int models = std::min(kModels, job.model_count - first);
    PartialSums partial[kModels] = {}, of_sum{};
    PartialSums* const last = squares != nullptr && first + models == job.model_count ? &of_sum : nullptr;
    std::int64_t at = begin;
    for (; at + kStep <= begin + count; at += kStep)
      accumulate_step<Compute>(job, at, AllEntries{}, first, models, partial, last);
    if (at < begin + count)
      accumulate_step<Compute>(job, at, FirstEntries{begin + count - at}, first, models, partial, last);
    for (int m = 0; m < models; ++m) sums[first + m] = partial[m].total();
    if (last != nullptr) *squares = of_sum.total();
  }
}

template <typename Compute, typename Entries>
FM_INLINE void add_round_step(const AddRoundJob& job, std::int64_t at, Entries entries) {
  const Compute scale = static_cast<Compute>(job.scale);
  const Compute factor = static_cast<Compute>(job.factor);
  Group<Compute> base[kGroups], sum[kGroups];
  prefetch(job.base, at, kStep);
  prefetch(job.delta, at, kStep);
  load_groups(job.base, at, entries, base);
  load_groups(job.delta, at, entries, sum);
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 8
    for (int i = 0; i < Group<Compute>::kParts; ++i)
      sum[g].part[i] = base[g].part[i] + scale * (factor * sum[g].part[i]);
  }
  store_groups(job.out, job.out_dtype, at, entries, sum);
}

// Whether entries [begin, begin + count) are finite: whether none has all of the exponent's bits.
template <typename Word>
bool finite_words(const void* data, Word exponent, std::int64_t begin, std::int64_t count) {
  const Word* const words = static_cast<const Word*>(data) + begin;
  Word found = 0;
  for (std::int64_t j = 0; j < count; ++j) found |= static_cast<Word>((words[j] & exponent) == exponent);
  return found == 0;
}

bool finite(const void* data, DType dtype, std::int64_t begin, std::int64_t count) {
  if (dtype == DType::kBFloat16) return finite_words<std::uint16_t>(data, 0x7f80, begin, count);
  if (dtype == DType::kFloat16) return finite_words<std::uint16_t>(data, 0x7c00, begin, count);
  if (dtype == DType::kFloat32) return finite_words<std::uint32_t>(data, 0x7f800000, begin, count);
  return finite_words<std::uint64_t>(data, 0x7ff0000000000000, begin, count);
}

template <typename Compute>
bool add_round_range_as(const AddRoundJob& job, std::int64_t begin, std::int64_t count) {
  std::int64_t at = begin;
  for (; at + kStep <= begin + count; at += kStep) add_round_step<Compute>(job, at, AllEntries{});
  if (at < begin + count) add_round_step<Compute>(job, at, FirstEntries{begin + count - at});
  return finite(job.out, job.out_dtype, begin, count);  // still in the cache
}

constexpr float kLargest = std::numeric_limits<float>::max();

template <typename T>
void elect_range_as(const ElectJob& job, std::int64_t begin, std::int64_t count) {
  const T* const delta = static_cast<const T*>(job.delta.data) + begin;
  const T weight = static_cast<T>(job.weight);
  const T share = weight < 0 ? -weight : weight;
  const float least = job.range.least;
  const float outlier = job.range.outlier <= kLargest ? job.range.outlier : std::nanf("");
  for (int side = 0; side < 2; ++side) {
    T* const sum = static_cast<T*>(job.election.sums[side]) + begin;
    const T sign = side == 0 ? T{1} : T{-1};
    const auto elected = [&](std::int64_t j) {
      const auto magnitude = static_cast<float>(delta[j] < 0 ? -delta[j] : delta[j]);
      const T v = weight * delta[j];
      return magnitude >= least && !(magnitude >= outlier) && sign * v > 0 ? v : T{0};
    };
    if (job.election.shares[side] == nullptr) {
      for (std::int64_t j = 0; j < count; ++j) sum[j] += elected(j);
      continue;
    }
    T* const shares = static_cast<T*>(job.election.shares[side]) + begin;
    for (std::int64_t j = 0; j < count; ++j) {
      const T v = elected(j);
      sum[j] += v;
      shares[j] += v != 0 ? share : T{0};
    }
  }
}

template <typename T>
void decide_range_as(const Election& election, std::int64_t begin, std::int64_t count) {
  T* const positive = static_cast<T*>(election.sums[0]) + begin;
  const T* const negative = static_cast<const T*>(election.sums[1]) + begin;
  const auto decided = [&](std::int64_t j, T of_positive, T of_negative) {
    const T total = positive[j] + negative[j];
    const T elected = total > 0 ? positive[j] / of_positive : negative[j] / of_negative;
    return total == 0 ? T{0} : elected;
  };
  if (election.shares[0] == nullptr) {
    for (std::int64_t j = 0; j < count; ++j) positive[j] = decided(j, T{1}, T{1});
    return;
  }
  const T* const of_positive = static_cast<const T*>(election.shares[0]) + begin;
  const T* const of_negative = static_cast<const T*>(election.shares[1]) + begin;
  for (std::int64_t j = 0; j < count; ++j) positive[j] = decided(j, of_positive[j], of_negative[j]);
}

template <typename Compute, typename Entries>
FM_INLINE void square_sum_step(Storage x, std::int64_t at, Entries entries, PartialSums& sums) {
  prefetch(x, at, kStep);
  Group<Compute> groups[kGroups];
  load_groups(x, at, entries, groups);
  add_squares(groups, sums);
}

template <typename Compute>
double square_sum_range_as(Storage x, std::int64_t begin, std::int64_t count) {
  PartialSums sums{};
  std::int64_t at = begin;
  for (; at + kStep <= begin + count; at += kStep) square_sum_step<Compute>(x, at, AllEntries{}, sums);
  if (at < begin + count) square_sum_step<Compute>(x, at, FirstEntries{begin + count - at}, sums);
  return sums.total();
}

}  // namespace

void accumulate_range(const AccumulateJob& job, std::int64_t begin, std::int64_t count, double* sums,
                      double* squares) {
  if (job.compute == DType::kFloat64) {
    accumulate_range_as<double>(job, begin, count, sums, squares);
  } else {
    accumulate_range_as<float>(job, begin, count, sums, squares);
  }
}

bool add_round_range(const AddRoundJob& job, std::int64_t begin, std::int64_t count) {
  return job.compute == DType::kFloat64 ? add_round_range_as<double>(job, begin, count)
                                        : add_round_range_as<float>(job, begin, count);
}

void elect_range(const ElectJob& job, std::int64_t begin, std::int64_t count) {
  if (job.delta.dtype == DType::kFloat64) {
    elect_range_as<double>(job, begin, count);
  } else {
    elect_range_as<float>(job, begin, count);
  }
}

void decide_range(const Election& election, DType dtype, std::int64_t begin, std::int64_t count) {
  if (dtype == DType::kFloat64) {
    decide_range_as<double>(election, begin, count);
  } else {
    decide_range_as<float>(election, begin, count);
  }
}

double square_sum_range(Storage x, std::int64_t begin, std::int64_t count) {
  return x.dtype == DType::kFloat64 ? square_sum_range_as<double>(x, begin, count)
                                    : square_sum_range_as<float>(x, begin, count);
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
