// A filter by its definition, for the native tests: DFTs of the rows and columns as plain sums in double
// precision, masks bin by bin, and back. And random numbers to feed it.
#pragma once

#include <cmath>
#include <complex>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "dtype.h"
#include "mask.h"

namespace freemerge::test {

using Complex = std::complex<double>;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
  double normal() { return normal_(engine_); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// n values `step` apart, in place; sign -1 forward, +1 inverse (unscaled).
inline void direct_transform(Complex* data, std::int64_t n, std::int64_t step, int sign) {
  const double angle = sign * 2 * std::acos(-1.0) / static_cast<double>(n);
  std::vector<Complex> roots, result;
  for (std::int64_t k = 0; k < n; ++k) roots.push_back(std::polar(1.0, angle * static_cast<double>(k)));
  for (std::int64_t k = 0; k < n; ++k) {
    Complex sum = 0;
    for (std::int64_t j = 0; j < n; ++j) sum += data[j * step] * roots[static_cast<std::size_t>(j * k % n)];
    result.push_back(sum);
  }
  for (std::int64_t k = 0; k < n; ++k) data[k * step] = result[static_cast<std::size_t>(k)];
}

inline std::vector<double> reference(const std::vector<double>& x, const Mask& mask, double scale) {
  const std::int64_t height = mask.height, width = mask.width;
  std::vector<Complex> z(x.begin(), x.end());
  for (std::int64_t y = 0; y < height; ++y)
    direct_transform(&z[static_cast<std::size_t>(y * width)], width, 1, -1);
  for (std::int64_t k = 0; k < width; ++k)
    direct_transform(&z[static_cast<std::size_t>(k)], height, width, -1);
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t k = 0; k < width; ++k) {
      const bool left = k <= width / 2;
      z[static_cast<std::size_t>(y * width + k)] *=
          left ? mask_gain(mask, y, k) : mask_gain(mask, (height - y) % height, width - k);
    }
  }
  for (std::int64_t k = 0; k < width; ++k)
    direct_transform(&z[static_cast<std::size_t>(k)], height, width, 1);
  for (std::int64_t y = 0; y < height; ++y)
    direct_transform(&z[static_cast<std::size_t>(y * width)], width, 1, 1);
  std::vector<double> result;
  for (const Complex value : z) result.push_back(scale * value.real() / static_cast<double>(height * width));
  return result;
}

// Arithmetic error, and the spacing of the storage type: a result next to a rounding boundary may go the
// other way.
template <typename Storage>
struct Precision;
template <>
struct Precision<float> {
  static constexpr double kError = 5e-7, kSpacing = 0;
};
template <>
struct Precision<double> {
  static constexpr double kError = 1e-14, kSpacing = 0;
};
template <>
struct Precision<bfloat16> {
  static constexpr double kError = 5e-7, kSpacing = 0x1p-7;
};
template <>
struct Precision<float16> {
  static constexpr double kError = 5e-7, kSpacing = 0x1p-10;
};

template <typename Storage>
Storage stored(double x) {
  if constexpr (std::is_same_v<Storage, double>) {
    return x;
  } else {
    return round_to<Storage>(static_cast<float>(x));
  }
}

}  // namespace freemerge::test
