#include "cuda/chirp.h"

#include <complex>
#include <vector>

#include "common/error.h"

namespace freemerge::cuda {
namespace {

using Signal = std::vector<std::complex<double>>;

Signal roots_of(std::int64_t n) {
  constexpr double kPi = 3.14159265358979323846;
  Signal roots;
  for (std::int64_t k = 0; k < n; ++k)
    roots.push_back(std::polar(1.0, -2.0 * kPi * static_cast<double>(k) / static_cast<double>(n)));
  return roots;
}

// What the kernels' passes do, in double.
void transform(Signal& signal, const Passes& passes) {
  const auto length = static_cast<std::size_t>(passes.length);
  const Signal roots = roots_of(passes.length);
  std::size_t stride = length;
  for (int i = 0; i < passes.count; ++i) {
    const auto radix = static_cast<std::size_t>(passes.radix[i]);
    stride /= radix;
    for (std::size_t first = 0; first < length; ++first) {
      if (first / stride % radix != 0) continue;  // another's
      Signal sums(radix);
      for (std::size_t p = 0; p < radix; ++p) {
        for (std::size_t q = 0; q < radix; ++q)
          sums[p] += signal[first + q * stride] * roots[p * q % radix * (length / radix)];
        sums[p] *= roots[first % stride * p * (length / (stride * radix))];
      }
      for (std::size_t p = 0; p < radix; ++p) signal[first + p * stride] = sums[p];
    }
  }
}

std::vector<float2> to_floats(const Signal& signal) {
  std::vector<float2> floats;
  for (const std::complex<double>& value : signal)
    floats.push_back({static_cast<float>(value.real()), static_cast<float>(value.imag())});
  return floats;
}

}  // namespace

Chirp chirp_tables(std::int64_t length, const Passes& points, const Upload& upload) {
  require(points.length >= 2 * length - 1, "a convolution must have 2 n - 1 points for n samples");
  const Signal roots = roots_of(2 * length);
  Signal factors;
  Signal inverse(static_cast<std::size_t>(points.length));
  for (std::int64_t k = 0; k < length; ++k) {
    factors.push_back(roots[static_cast<std::size_t>(k * k % (2 * length))]);  // no angle is rounded
    const std::complex<double> value = std::conj(factors.back()) / static_cast<double>(points.length);
    inverse[static_cast<std::size_t>(k)] = value;
    inverse[static_cast<std::size_t>((points.length - k) % points.length)] = value;
  }
  transform(inverse, points);
  return {static_cast<int>(length), to_device(to_floats(factors), upload),
          to_device(to_floats(inverse), upload)};
}

}  // namespace freemerge::cuda
