// A filter by its definition, for the native tests: DFTs of the rows (one half) and columns as plain sums in
// double precision, masks bin by bin, and back. And random numbers to feed it.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/mask.h"

namespace freemerge::test {

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

// The oracle is not under test, and instrumented it would take most of the time.
#define FM_ORACLE __attribute__((no_sanitize("address", "thread", "undefined"), noinline))

// Cosines and sines of 2 pi j k / n, rows j of n columns k.
struct Circle {
  std::vector<double> cosine, sine;

  FM_ORACLE explicit Circle(std::int64_t n) {
    const double angle = 2 * std::acos(-1.0) / static_cast<double>(n);
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t k = 0; k < n; ++k) {
        cosine.push_back(std::cos(angle * static_cast<double>(j * k % n)));
        sine.push_back(std::sin(angle * static_cast<double>(j * k % n)));
      }
    }
  }
};

// to[i] += factor * from[i]
FM_ORACLE inline void add(double factor, const double* from, std::int64_t count, double* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// One half of a spectrum, rows of `columns` bins.
struct Half {
  std::vector<double> re, im;

  Half(std::int64_t rows, std::int64_t columns)
      : re(static_cast<std::size_t>(rows * columns)), im(static_cast<std::size_t>(rows * columns)) {}
};

// Down every column; sign -1 forward, +1 inverse (unscaled).
FM_ORACLE inline Half transform_columns(const Half& z, const Circle& circle, std::int64_t rows,
                                        std::int64_t columns, double sign) {
  Half out(rows, columns);
  for (std::int64_t y = 0; y < rows; ++y) {
    for (std::int64_t j = 0; j < rows; ++j) {
      const double c = circle.cosine.data()[y * rows + j], s = sign * circle.sine.data()[y * rows + j];
      double *const re = out.re.data() + j * columns, *const im = out.im.data() + j * columns;
      add(c, z.re.data() + y * columns, columns, re);
      add(-s, z.im.data() + y * columns, columns, re);
      add(s, z.re.data() + y * columns, columns, im);
      add(c, z.im.data() + y * columns, columns, im);
    }
  }
  return out;
}

FM_ORACLE inline std::vector<double> reference(const std::vector<double>& x, const Mask& mask, double scale) {
  const std::int64_t height = mask.height, width = mask.width, columns = width / 2 + 1;
  const Circle along(width), down(height);
  Half z(height, columns);
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t n = 0; n < width; ++n) {
      const double value = x.data()[y * width + n];
      add(value, along.cosine.data() + n * width, columns, z.re.data() + y * columns);
      add(-value, along.sine.data() + n * width, columns, z.im.data() + y * columns);
    }
  }
  z = transform_columns(z, down, height, columns, -1);
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t k = 0; k < columns; ++k) {
      const double twice = k == 0 || 2 * k == width ? 1 : 2;  // for the bin and its mirror image
      const double gain = twice * scale * mask_gain(mask, y, k) / static_cast<double>(height * width);
      z.re.data()[y * columns + k] *= gain;
      z.im.data()[y * columns + k] *= gain;
    }
  }
  z = transform_columns(z, down, height, columns, 1);
  std::vector<double> result(x.size());
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t k = 0; k < columns; ++k) {
      double* const row = result.data() + y * width;
      add(z.re.data()[y * columns + k], along.cosine.data() + k * width, width, row);
      add(-z.im.data()[y * columns + k], along.sine.data() + k * width, width, row);
    }
  }
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
