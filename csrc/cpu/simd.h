// One vector abstraction for every instruction set. It is compiled once per instruction set, in a namespace
// of its own, for which CMakeLists.txt defines
//   FREEMERGE_ISA           the namespace (avx512, avx2, baseline)
//   FREEMERGE_VECTOR_BYTES  the register width
// Vectors are the compiler's own (GCC and Clang), so + - * / work on them and mix with scalars, and the same
// source serves NEON. kernels_isa.cpp is compiled with -ffp-contract=fast: a * b + c is one fused
// multiply-add where the processor has it; accumulate_kernels.cpp with -ffp-contract=off. Nothing here may
// call an inline function of another header: the linker would be free to keep the AVX-512 copy for everybody.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FM_INLINE inline __attribute__((always_inline))

// GCC has it from version 12 on.
#if defined(__clang__) || __GNUC__ >= 12
#define FM_HAS_SHUFFLEVECTOR 1
#else
#define FM_HAS_SHUFFLEVECTOR 0
#endif

namespace freemerge::FREEMERGE_ISA {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FREEMERGE_VECTOR_BYTES)));
};

// kLanes<T> values of T; T is the arithmetic type, float or double.
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
inline constexpr int kLanes = FREEMERGE_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Arithmetic type of a storage type.
template <typename Storage>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <typename Storage>
using Arithmetic = typename ArithmeticOf<Storage>::type;

FM_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

using FloatVec = Vec<float>;
using WordVec = Vec<std::uint32_t>;
typedef std::uint16_t HalfVec __attribute__((vector_size(FREEMERGE_VECTOR_BYTES / 2)));

template <typename To, typename From>
FM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
FM_INLINE Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

template <typename V, typename T>
FM_INLINE V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename V, typename T>
FM_INLINE V load_raw_partial(const T* p, std::int64_t count) {
  V v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(T));
  return v;
}

// Conversions -----------------------------------------------------------------------------------------------

// Lanes of `yes` where `condition` (all ones or all zeros per lane) holds, of `no` elsewhere.
template <typename V>
FM_INLINE V select(V condition, V yes, V no) {
  return (condition & yes) | (~condition & no);
}

#if defined(__AVX512F__) && FM_HAS_SHUFFLEVECTOR
// Shuffles of 16-bit lanes: faster here than conversions and shifts.
typedef std::uint16_t HalfWords __attribute__((vector_size(FREEMERGE_VECTOR_BYTES)));
template <int... Lane>
FM_INLINE WordVec to_high_halves(HalfVec halves, std::integer_sequence<int, Lane...>) {
  const HalfWords words = __builtin_shufflevector(halves, HalfVec{}, (Lane % 2 == 0 ? 16 : Lane / 2)...);
  return bit_cast<WordVec>(words);
}
template <int... Lane>
FM_INLINE HalfVec from_high_halves(WordVec words, std::integer_sequence<int, Lane...>) {
  const HalfWords halves = bit_cast<HalfWords>(words);
  return __builtin_shufflevector(halves, halves, (2 * Lane + 1)...);
}
FM_INLINE WordVec to_high_halves(HalfVec halves) {
  return to_high_halves(halves, std::make_integer_sequence<int, 32>{});
}
FM_INLINE HalfVec from_high_halves(WordVec words) {
  return from_high_halves(words, std::make_integer_sequence<int, 16>{});
}
#elif defined(__AVX2__) && FREEMERGE_VECTOR_BYTES == 32
// As few instructions as there can be: GCC makes twice as many of the conversions below.
FM_INLINE WordVec to_high_halves(HalfVec halves) {
  return bit_cast<WordVec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)), 16));
}
FM_INLINE HalfVec from_high_halves(WordVec words) {
  const __m256i low = bit_cast<__m256i>(words >> 16);
  return bit_cast<HalfVec>(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
#else
FM_INLINE WordVec to_high_halves(HalfVec halves) { return __builtin_convertvector(halves, WordVec) << 16; }
FM_INLINE HalfVec from_high_halves(WordVec words) { return __builtin_convertvector(words >> 16, HalfVec); }
#endif

FM_INLINE FloatVec widen_bfloat16(HalfVec bits) { return bit_cast<FloatVec>(to_high_halves(bits)); }

// To nearest, ties to even (as round_to<> in dtype.h). NaN needs no case of its own: the 16 low bits of those
// met here are zero, because they come from 16-bit storage or from the processor.
FM_INLINE HalfVec narrow_bfloat16(FloatVec x) {
  const WordVec u = bit_cast<WordVec>(x);
  return from_high_halves(u + 0x7fffu + ((u >> 16) & 1u));
}

#if defined(__AVX512F__)
// The masked forms, because GCC 12 warns of an uninitialised value inside the plain ones.
FM_INLINE FloatVec widen_float16(HalfVec bits) {
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits));
}
FM_INLINE HalfVec narrow_float16(FloatVec x) {
  return bit_cast<HalfVec>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FM_INLINE FloatVec widen_float16(HalfVec bits) { return _mm256_cvtph_ps(bit_cast<__m128i>(bits)); }
FM_INLINE HalfVec narrow_float16(FloatVec x) {
  return bit_cast<HalfVec>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// The bit arithmetic of dtype.h, lane by lane.
FM_INLINE FloatVec widen_float16(HalfVec bits) {
  const WordVec u = __builtin_convertvector(bits, WordVec);
  const WordVec sign = (u & 0x8000u) << 16;
  const WordVec magnitude = u & 0x7fffu;
  const WordVec wide = (magnitude << 13) + 0x38000000u;
  const WordVec subnormal = bit_cast<WordVec>(bit_cast<FloatVec>(wide + 0x00800000u) - 0x1p-14f);
  const WordVec finite = select(bit_cast<WordVec>(magnitude < 0x400u), subnormal, wide);
  const WordVec special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<FloatVec>(sign | select(bit_cast<WordVec>(magnitude >= 0x7c00u), special, finite));
}
FM_INLINE HalfVec narrow_float16(FloatVec x) {
  const WordVec u = bit_cast<WordVec>(x);
  const WordVec magnitude = u & 0x7fffffffu;
  const WordVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding a half makes the float adder round at the subnormal half's last bit.
  const WordVec subnormal =
      bit_cast<WordVec>(bit_cast<FloatVec>(magnitude) + 0.5f) - bit_cast<WordVec>(broadcast(0.5f));
  WordVec half = select(bit_cast<WordVec>(magnitude < 0x38800000u), subnormal, normal);
  half = select(bit_cast<WordVec>(magnitude >= 0x477ff000u), WordVec{} + 0x7c00u, half);
  half = select(bit_cast<WordVec>(magnitude > 0x7f800000u), WordVec{} + 0x7e00u, half);
  return __builtin_convertvector(((u >> 16) & 0x8000u) | half, HalfVec);
}
#endif

// The low and the high lanes. GCC 12 takes conversions of the compiler's own vectors apart.
typedef float HalfOfFloats __attribute__((vector_size(FREEMERGE_VECTOR_BYTES / 2)));
FM_INLINE Vec<double> widen(HalfOfFloats half) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, half);
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(half);
#elif defined(__SSE2__)
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&half))));
#else
  return __builtin_convertvector(half, Vec<double>);
#endif
}
FM_INLINE void widen(FloatVec v, Vec<double>& low, Vec<double>& high) {
  struct Halves {
    HalfOfFloats low, high;
  };
  const Halves halves = bit_cast<Halves>(v);
  low = widen(halves.low);
  high = widen(halves.high);
}
FM_INLINE HalfOfFloats narrow(Vec<double> v) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtpd_ps(0xff, v);
#elif defined(__AVX2__)
  return _mm256_cvtpd_ps(v);
#else
  return __builtin_convertvector(v, HalfOfFloats);
#endif
}
FM_INLINE FloatVec narrow(Vec<double> low, Vec<double> high) {
  struct Halves {
    HalfOfFloats low, high;
  };
  return bit_cast<FloatVec>(Halves{narrow(low), narrow(high)});
}

// Loads and stores: storage type in memory, arithmetic type in the register, no alignment asked for
// -----------

FM_INLINE Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
FM_INLINE Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
FM_INLINE Vec<float> load(const bfloat16* p) { return widen_bfloat16(load_raw<HalfVec>(p)); }
FM_INLINE Vec<float> load(const float16* p) { return widen_float16(load_raw<HalfVec>(p)); }

FM_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
FM_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
FM_INLINE void store(bfloat16* p, Vec<float> v) {
  const HalfVec h = narrow_bfloat16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
FM_INLINE void store(float16* p, Vec<float> v) {
  const HalfVec h = narrow_float16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` lanes only, 0 <= count <= kLanes; memory beyond them is neither read nor written, and the
// other lanes of a load are zero.
#if defined(__AVX512F__)
FM_INLINE Vec<float> load_partial(const float* p, std::int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}
FM_INLINE Vec<double> load_partial(const double* p, std::int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), p);
}
FM_INLINE HalfVec load_half_partial(const void* p, std::int64_t count) {
  return bit_cast<HalfVec>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p));
}
FM_INLINE void store_partial(float* p, Vec<float> v, std::int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), v);
}
FM_INLINE void store_partial(double* p, Vec<double> v, std::int64_t count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1u), v);
}
FM_INLINE void store_half_partial(void* p, HalfVec v, std::int64_t count) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1u), bit_cast<__m256i>(v));
}
#else
FM_INLINE Vec<float> load_partial(const float* p, std::int64_t count) {
  return load_raw_partial<Vec<float>>(p, count);
}
FM_INLINE Vec<double> load_partial(const double* p, std::int64_t count) {
  return load_raw_partial<Vec<double>>(p, count);
}
FM_INLINE HalfVec load_half_partial(const void* p, std::int64_t count) {
  return load_raw_partial<HalfVec>(static_cast<const std::uint16_t*>(p), count);
}
FM_INLINE void store_partial(float* p, Vec<float> v, std::int64_t count) {
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
}
FM_INLINE void store_partial(double* p, Vec<double> v, std::int64_t count) {
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(double));
}
FM_INLINE void store_half_partial(void* p, HalfVec v, std::int64_t count) {
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(std::uint16_t));
}
#endif
FM_INLINE Vec<float> load_partial(const bfloat16* p, std::int64_t count) {
  return widen_bfloat16(load_half_partial(p, count));
}
FM_INLINE Vec<float> load_partial(const float16* p, std::int64_t count) {
  return widen_float16(load_half_partial(p, count));
}
FM_INLINE void store_partial(bfloat16* p, Vec<float> v, std::int64_t count) {
  store_half_partial(p, narrow_bfloat16(v), count);
}
FM_INLINE void store_partial(float16* p, Vec<float> v, std::int64_t count) {
  store_half_partial(p, narrow_float16(v), count);
}

// Into the caches, for a read soon.
FM_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Not into the first level, where rows a multiple of 4 KB apart would evict each other.
FM_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Transpose
// ---------------------------------------------------------------------------------------------------

// Lane i of the result is lane `Lane[i]` of `a` followed by `b`.
template <int... Lane, typename V>
FM_INLINE V shuffle(V a, V b) {
#if FM_HAS_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, Lane...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, std::int64_t, std::int32_t>;
  return __builtin_shuffle(a, b, Vec<Index>{Lane...});
#endif
}

// One step: blocks of `Distance` lanes of `a` and `b` are exchanged across their common diagonal.
template <int Distance, typename T, int... Lane>
FM_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> low = shuffle<((Lane & Distance) ? Lane - Distance + n : Lane)...>(a, b);
  const Vec<T> high = shuffle<((Lane & Distance) ? Lane + n : Lane + Distance)...>(a, b);
  a = low;
  b = high;
}

template <int Distance, typename T>
FM_INLINE void transpose_step(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & Distance) == 0) {
      exchange<Distance, T>(rows[i], rows[i + Distance], std::make_integer_sequence<int, kLanes<T>>{});
    }
  }
}

// rows[i][j] <-> rows[j][i], in registers.
template <typename T, int Distance = kLanes<T> / 2>
FM_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  transpose_step<Distance, T>(rows);
  if constexpr (Distance > 1) transpose<T, Distance / 2>(rows);
}

}  // namespace freemerge::FREEMERGE_ISA
