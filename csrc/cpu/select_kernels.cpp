#include "cpu/select_kernels.h"

#include <algorithm>

#include "cpu/loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace freemerge {
namespace FREEMERGE_ISA {
namespace {

constexpr int kLanes = 16;
constexpr std::uint32_t kMagnitude = 0x7fffffffu;

// Entries of stored arrays, a chunk at a time, into short arrays that stay in L1.
template <typename Compute>
void load(Storage source, std::int64_t begin, std::int64_t count, Compute* out) {
  visit_dtype(source.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* in = static_cast<const T*>(source.data) + begin;
    for (std::int64_t j = 0; j < count; ++j) out[j] = static_cast<Compute>(to_float(in[j]));
  });
}

// v = source - base.
template <typename Compute, typename Out>
void load_difference(Storage source, const Compute* base, std::int64_t begin, std::int64_t count, Out* v) {
  visit_dtype(source.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* in = static_cast<const T*>(source.data) + begin;
    for (std::int64_t j = 0; j < count; ++j) {
      v[j] = static_cast<Out>(static_cast<Compute>(to_float(in[j])) - base[j]);
    }
  });
}

// Bit l is set where |v[l]| has bits >= threshold, 1 <= threshold <= 2^31 - 1.
#if defined(__AVX512F__)
inline unsigned hits(const float* v, std::uint32_t threshold) {
  const __m512i bits =
      _mm512_and_si512(_mm512_loadu_si512(v), _mm512_set1_epi32(static_cast<int>(kMagnitude)));
  return _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(static_cast<int>(threshold)));
}
#elif defined(__AVX2__)
inline unsigned hits(const float* v, std::uint32_t threshold) {
  const __m256i below = _mm256_set1_epi32(static_cast<int>(threshold) - 1);
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(kMagnitude));
  unsigned result = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i bits =
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 8 * half)), mask);
    const auto above =
        static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(bits, below))));
    result |= above << (8 * half);
  }
  return result;
}
#else
inline unsigned hits(const float* v, std::uint32_t threshold) {
  unsigned result = 0;
  for (int l = 0; l < kLanes; ++l) {
    result |= static_cast<unsigned>((float_bits(v[l]) & kMagnitude) >= threshold) << l;
  }
  return result;
}
#endif

// visit(at, m, v) for each chunk of the task vector; v is padded with zeros to a multiple of kLanes.
template <typename Compute, typename Visit>
void for_each_chunk_as(const TaskVector& source, std::int64_t begin, std::int64_t count, const Visit& visit) {
  alignas(64) Compute base[kChunk];
  alignas(64) float v[kChunk];
  for (std::int64_t offset = 0; offset < count; offset += kChunk) {
    const std::int64_t at = begin + offset;
    const std::int64_t m = std::min(kChunk, count - offset);
    prefetch(source.model, at, m);
    if (source.base.data == nullptr) {
      load(source.model, at, m, v);
    } else {
      prefetch(source.base, at, m);
      load(source.base, at, m, base);
      load_difference(source.model, base, at, m, v);
    }
    for (std::int64_t j = m; j % kLanes != 0; ++j) v[j] = 0.0f;
    visit(offset, m, v);
  }
}

template <typename Visit>
void for_each_chunk(const TaskVector& source, std::int64_t begin, std::int64_t count, const Visit& visit) {
  const bool wide = source.model.dtype == DType::kFloat64 ||
                    (source.base.data != nullptr && source.base.dtype == DType::kFloat64);
  if (wide) {
    for_each_chunk_as<double>(source, begin, count, visit);
  } else {
    for_each_chunk_as<float>(source, begin, count, visit);
  }
}

}  // namespace

std::int64_t collect_range(const TaskVector& source, std::int64_t begin, std::int64_t count,
                           std::uint32_t threshold, std::uint32_t* offsets, float* values) {
  std::int64_t found = 0;
  for_each_chunk(source, begin, count, [&](std::int64_t offset, std::int64_t m, const float* v) {
    for (std::int64_t j = 0; j < m; j += kLanes) {
      for (unsigned mask = hits(v + j, threshold); mask != 0; mask &= mask - 1) {
        const std::int64_t at = j + __builtin_ctz(mask);
        offsets[found] = static_cast<std::uint32_t>(offset + at);
        values[found] = v[at];
        ++found;
      }
    }
  });
  return found;
}

void count_range(const TaskVector& source, std::int64_t begin, std::int64_t count, MagnitudeBins bins,
                 std::uint32_t* counts) {
  const std::uint32_t bin_mask = (1u << bins.bits) - 1u;
  const int low_bits = bins.shift + bins.bits;
  const auto magnitude = [](float v) { return float_bits(v) & kMagnitude; };
  if (low_bits == 31) {  // all count
    for_each_chunk(source, begin, count, [&](std::int64_t, std::int64_t m, const float* v) {
      for (std::int64_t j = 0; j < m; ++j) ++counts[magnitude(v[j]) >> bins.shift];
    });
    return;
  }
  if (bins.above == 0) {
    for_each_chunk(source, begin, count, [&](std::int64_t, std::int64_t m, const float* v) {
      for (std::int64_t j = 0; j < m; ++j) {
        if (magnitude(v[j]) >> low_bits == 0) ++counts[magnitude(v[j]) >> bins.shift & bin_mask];
      }
    });
    return;
  }
  const std::uint32_t least = bins.above << low_bits, beyond = least + (1u << low_bits);
  for_each_chunk(source, begin, count, [&](std::int64_t, std::int64_t m, const float* v) {
    for (std::int64_t j = 0; j < m; j += kLanes) {
      unsigned mask = hits(v + j, least);
      if (mask != 0 && beyond <= kMagnitude) mask &= ~hits(v + j, beyond);
      for (; mask != 0; mask &= mask - 1)
        ++counts[magnitude(v[j + __builtin_ctz(mask)]) >> bins.shift & bin_mask];
    }
  });
}

}  // namespace FREEMERGE_ISA
}  // namespace freemerge
