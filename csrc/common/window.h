// Kaiser-Bessel windows: how the samples of one axis are spread onto a coarse grid, and how they are
// interpolated back from it.
//
// Sample n lies at u = n * cells / samples on the coarse grid and touches the `taps` cells around it with
// weights phi(u - cell). The DFT of the spread samples is the DFT of the samples times phi's transform (for
// |k| < band, up to an alias error of about exp(-pi * taps * sqrt(1 - (2 band - 1) / cells))).
// Barnett, Magland, af Klinteberg, "A parallel non-uniform FFT library ...", SIAM J. Sci. Comput. 41 (2019).
#pragma once

#include <cstdint>
#include <vector>

#include "common/bytes.h"
#include "common/plan.h"

namespace freemerge {

// A window as the kernels see it.
struct WindowView {
  const std::int64_t* first;
  const float* weights;
};

struct Window {
  // Samples first[c] .. first[c + 1] - 1, at least one, touch the coarse points c .. c + taps - 1 (modulo
  // cells).
  std::vector<std::int64_t> first;  // cells + 1 entries
  // Samples x taps. Around Nyquist those of odd samples are negated, and what an odd number of samples
  // spreads past the last cell once more: such a grid changes sign from period to period, and its
  // frequencies are k + 1/2.
  std::vector<float> weights;
  std::vector<double> transform;  // phi's transform at frequency k + half_bin / 2, 0 <= k < band

  WindowView view() const { return {first.data(), weights.data()}; }
  std::int64_t nbytes() const { return vector_bytes(first, weights, transform); }
};

// The first coarse point that sample n touches; it grows by at most one from a sample to the next.
std::int64_t first_cell(std::int64_t n, std::int64_t samples, const Decimation& decimation);

// Requires 2 * (band - 1 + half_bin) < cells <= samples, 2 <= taps <= 16, 2 * taps <= cells; or a whole axis,
// whose window has no weights and a transform of 1. The coarse origin is arbitrary, which a shift-invariant
// filter does not see.
Window make_window(std::int64_t samples, const Decimation& decimation);

}  // namespace freemerge
