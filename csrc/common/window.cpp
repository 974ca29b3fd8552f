#include "common/window.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/error.h"

namespace freemerge {

namespace {

constexpr double kPi = 3.14159265358979323846;

// Modified Bessel function of the first kind, order 0, by its power series.
double bessel_i0(double x) {
  const double quarter = 0.25 * x * x;
  double term = 1.0;
  double sum = 1.0;
  for (int k = 1; term > 1e-17 * sum; ++k) {
    term *= quarter / (static_cast<double>(k) * k);
    sum += term;
  }
  return sum;
}

// The shape parameter that balances truncation and aliasing (Beatty et al., IEEE Trans. Med. Imag. 24, 2005).
double kaiser_beta(const Decimation& d) {
  const double oversampling = static_cast<double>(d.cells) / static_cast<double>(2 * d.band - 1);
  const double reach = d.taps / oversampling * (oversampling - 0.5);
  return kPi * std::sqrt(std::max(1.0, reach * reach - 0.8));
}

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// The leftmost coarse point within reach of sample n. With an odd number of taps, half a cell of shift keeps
// every support inside taps + cells - 1 points.
std::int64_t leftmost(std::int64_t n, std::int64_t samples, const Decimation& d) {
  const std::int64_t doubled = 2 * n * d.cells + (d.taps % 2 != 0 ? samples : 0) - d.taps * samples;
  return floor_div(doubled, 2 * samples) + 1;
}

Window build_window(std::int64_t samples, const Decimation& d) {
  const double beta = kaiser_beta(d);
  const double peak = bessel_i0(beta);
  const bool odd = d.taps % 2 != 0;

  Window window;
  window.first.assign(static_cast<std::size_t>(d.cells + 1), samples);
  window.weights.resize(static_cast<std::size_t>(samples * d.taps));
  // Positions are n * cells / samples exactly: their fractions repeat with this period.
  const std::int64_t period = samples / std::gcd(samples, d.cells);
  const std::int64_t origin = leftmost(0, samples, d);
  std::int64_t cell = -1;
  for (std::int64_t n = 0; n < samples; ++n) {
    const std::int64_t left = leftmost(n, samples, d);
    if (left - origin != cell) window.first[static_cast<std::size_t>(++cell)] = n;

    float* weights = window.weights.data() + n * d.taps;
    if (n >= period) {
      std::copy_n(weights - period * d.taps, d.taps, weights);
      continue;
    }
    const double position =
        static_cast<double>(n * d.cells) / static_cast<double>(samples) + (odd ? 0.5 : 0.0);
    for (int j = 0; j < d.taps; ++j) {
      const double t = (position - static_cast<double>(left + j)) * 2.0 / d.taps;
      const double z = 1.0 - t * t;
      weights[j] = z < 0.0 ? 0.0f : static_cast<float>(bessel_i0(beta * std::sqrt(z)) / peak);
    }
  }
  if (d.nyquist) {
    for (std::int64_t n = 0; n < samples; ++n) {
      const std::int64_t cell = leftmost(n, samples, d) - origin;
      for (int j = 0; j < d.taps; ++j) {
        // Past the last cell comes the first one again, which the sample reaches from a period earlier.
        const std::int64_t from = cell + j < d.cells ? n : n - samples;
        if (from % 2 != 0) window.weights[static_cast<std::size_t>(n * d.taps + j)] *= -1.0f;
      }
    }
  }
  window.transform.resize(static_cast<std::size_t>(d.band));
  for (std::int64_t k = 0; k < d.band; ++k) {
    const double frequency = static_cast<double>(k) + 0.5 * half_bin(d, samples);
    const double x = kPi * d.taps * frequency / static_cast<double>(d.cells);
    const double squared = beta * beta - x * x;
    const double root = std::sqrt(std::abs(squared));
    const double shape = root == 0.0 ? 1.0 : (squared > 0.0 ? std::sinh(root) : std::sin(root)) / root;
    window.transform[static_cast<std::size_t>(k)] = d.taps * shape / peak;
  }
  return window;
}

}  // namespace

std::int64_t first_cell(std::int64_t n, std::int64_t samples, const Decimation& d) {
  return leftmost(n, samples, d) - leftmost(0, samples, d);
}

Window make_window(std::int64_t samples, const Decimation& d) {
  require(samples > 0 && d.band > 0, "decimation: samples and band must be positive");
  if (is_whole(d)) {
    require(d.cells == samples && d.band == samples / 2 + 1 && !d.nyquist,
            "decimation: a whole axis keeps all samples and frequencies");
    return {{}, {}, std::vector<double>(static_cast<std::size_t>(d.band), 1.0)};
  }
  require(d.taps >= 2 && d.taps <= 16, "decimation: taps must be between 2 and 16");
  require(d.cells > 2 * (d.band - 1 + half_bin(d, samples)),
          "decimation: cells must exceed twice the highest frequency kept");
  require(d.cells <= samples, "decimation: cells must not exceed the samples");
  require(d.cells >= 2 * d.taps, "decimation: cells must be at least twice the taps");
  return build_window(samples, d);
}

}  // namespace freemerge
