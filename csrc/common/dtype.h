// Storage types and one way to visit them. Arithmetic is float (double for float64 storage).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/error.h"

namespace freemerge {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct DTypeName {
  DType dtype;
  const char* name;
};

inline constexpr DTypeName kDTypeNames[] = {{DType::kFloat32, "float32"},
                                            {DType::kFloat64, "float64"},
                                            {DType::kBFloat16, "bfloat16"},
                                            {DType::kFloat16, "float16"}};

// The codes Python passes; an unknown one throws.
inline DType to_dtype(int code) {
  require(code >= 0 && code <= static_cast<int>(DType::kFloat16), "unknown dtype code");
  return static_cast<DType>(code);
}

inline std::int64_t byte_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

inline std::uint32_t float_bits(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_from_bits(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bfloat16 x) { return float_from_bits(static_cast<std::uint32_t>(x.bits) << 16); }

inline float to_float(float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Adding 112 turns the half exponent into a float one. A subnormal half gets one more, with a leading one
  // that is subtracted: no float here is subnormal, which a processor may be told to take for zero.
  const std::uint32_t wide = (magnitude << 13) + 0x38000000u;
  const float subnormal = float_from_bits(wide + 0x00800000u) - 0x1p-14f;
  return float_from_bits(sign | (magnitude < 0x400u ? float_bits(subnormal) : wide));
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
template <typename T>
inline T round_to(float x);

template <>
inline float round_to<float>(float x) {
  return x;
}

template <>
inline bfloat16 round_to<bfloat16>(float x) {
  const std::uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
inline float16 round_to<float16>(float x) {
  const std::uint32_t u = float_bits(x);
  const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above round to inf
  if (magnitude < 0x38800000u) {  // subnormal half: let a float addition do the rounding
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (float_bits(shifted) - float_bits(0.5f)))};
  }
  const std::uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
}

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Visitor>
decltype(auto) visit_dtype(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(TypeTag<float>{});
    case DType::kFloat64:
      return visit(TypeTag<double>{});
    case DType::kBFloat16:
      return visit(TypeTag<bfloat16>{});
    case DType::kFloat16:
      return visit(TypeTag<float16>{});
  }
  throw std::invalid_argument("unknown dtype");
}

}  // namespace freemerge
