// A filter by its definition, for the native tests: DFTs of the rows (one half) and columns as plain sums in
// double precision, masks bin by bin, and back. And random numbers to feed it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
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

// Sums of squares over one matrix: of what differs, of what was expected, and of the input times the scale.
struct Squares {
  double difference = 0, expected = 0, input = 0;
};

// A batch of random matrices, each allocated to the element, so that a sanitizer sees any access outside.
template <typename Storage>
class Matrices {
 public:
  Matrices(Random& random, std::int64_t height, std::int64_t width, std::int64_t stride)
      : height_(height), width_(width), stride_(stride) {
    const auto size = static_cast<std::size_t>((height - 1) * stride + width);
    for (std::int64_t i = random.integer(1, 3); i > 0; --i) {
      memory_.push_back(std::make_unique<Storage[]>(size));
      std::fill_n(memory_.back().get(), size, gap_);
      std::vector<double> input;
      for (std::int64_t y = 0; y < height; ++y) {
        for (std::int64_t x = 0; x < width; ++x) {
          const Storage value = stored<Storage>(random.normal());
          memory_.back()[static_cast<std::size_t>(y * stride + x)] = value;
          input.push_back(static_cast<double>(to_float(value)));
        }
      }
      inputs_.push_back(std::move(input));
    }
  }

  std::size_t count() const { return inputs_.size(); }

  // Filters all of them, while the mask's table cannot be read any more; `means` as Filter::run() takes them.
  template <typename Filter, typename... Means>
  void run(const Filter& filter, std::vector<float>& table, double scale, int threads,
           const Means&... means) {
    std::vector<void*> matrices;
    for (const auto& matrix : memory_) matrices.push_back(matrix.get());
    std::vector<float> lost(table.size(), std::nanf(""));
    std::swap_ranges(table.begin(), table.end(), lost.begin());
    filter.run(matrices, std::vector(matrices.size(), stride_), scale, threads, means...);
    std::swap_ranges(table.begin(), table.end(), lost.begin());
  }

  // Matrix i against the definition; what lies between its rows must be as it was.
  Squares compare(std::size_t i, const Mask& mask, double scale, const std::string& label) const {
    const std::vector<double> expected = reference(inputs_[i], mask, scale);
    Squares squares;
    for (std::int64_t y = 0; y < height_; ++y) {
      for (std::int64_t x = 0; x < (y == height_ - 1 ? width_ : stride_); ++x) {
        const Storage found = memory_[i][static_cast<std::size_t>(y * stride_ + x)];
        if (x >= width_) {
          check(std::memcmp(&found, &gap_, sizeof gap_) == 0,
                [&] { return label + ": gaps between rows are left alone"; });
          continue;
        }
        const auto index = static_cast<std::size_t>(y * width_ + x);
        const double d = static_cast<double>(to_float(found)) -
                         static_cast<double>(to_float(stored<Storage>(expected[index])));
        squares.difference += d * d;
        squares.expected += expected[index] * expected[index];
        squares.input += scale * scale * inputs_[i][index] * inputs_[i][index];
      }
    }
    return squares;
  }

 private:
  std::int64_t height_, width_, stride_;
  Storage gap_ = stored<Storage>(-7);
  std::vector<std::unique_ptr<Storage[]>> memory_;
  std::vector<std::vector<double>> inputs_;
};

}  // namespace freemerge::test
