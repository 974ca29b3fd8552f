// The only C++ definition of a frequency mask; its Python twin is python/freemerge/responses/ and a test
// compares the two on every bin. Usable from host and device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#if defined(__CUDACC__)
#define FM_HOST_DEVICE __host__ __device__
#else
#define FM_HOST_DEVICE
#endif

namespace freemerge {

// The smooth responses of the radius: X(kind, name in Python, gain), where the gain is an expression, of type
// Real, of `s` = (r / D0)^2, in double, and the numbers of the mask `m`, and rises or falls throughout. Real
// is double on the CPU, float on a GPU. A line here and a class in python/freemerge/responses/ are all it
// takes to add one.
#define FM_SMOOTH_MASKS(X)                                     \
  X(kButterworth, "butterworth", butterworth_gain<Real>(m, s)) \
  X(kGaussian, "gaussian", -std::expm1(static_cast<Real>(-0.5 * s)))

// The others, which other_gain() knows.
#define FM_OTHER_MASKS(X)  \
  X(kSteps, "steps")       \
  X(kOfficial, "official") \
  X(kCenter, "center")     \
  X(kTable, "table")

enum class MaskKind : int {
#define FM_KIND(kind, ...) kind,
  FM_OTHER_MASKS(FM_KIND) FM_SMOOTH_MASKS(FM_KIND)
#undef FM_KIND
};

struct MaskName {
  MaskKind kind;
  const char* name;
};

inline constexpr MaskName kMaskNames[] = {
#define FM_NAME(kind, name, ...) {MaskKind::kind, name},
    FM_OTHER_MASKS(FM_NAME) FM_SMOOTH_MASKS(FM_NAME)
#undef FM_NAME
};

// Plain data, so that it can be a kernel argument.
struct Mask {
  MaskKind kind = MaskKind::kSteps;
  std::int64_t height = 1;
  std::int64_t width = 1;
  double unit_y =
      1.0;  // radius = hypot(unit_y * ky, unit_x * kx); 1 for DFT bins, 1/H and 1/W when normalised
  double unit_x = 1.0;
  double edge0 = 0.0;  // kSteps: inner edge; smooth kinds: D0; kOfficial: outer radius
  double edge1 = 0.0;  // kSteps: outer edge; kOfficial: ring radius
  double gain0 = 0.0;  // kSteps: gain below edge0, between the edges, from edge1 on
  double gain1 = 0.0;
  double gain2 = 0.0;
  double order = 1.0;            // kButterworth
  int axis = 1;                  // kCenter: 1 removes each row's mean (kx = 0), 0 each column's (ky = 0)
  const float* table = nullptr;  // kTable: symmetrised gains, H x (W/2 + 1), row-major, stored order
};

FM_HOST_DEVICE inline double signed_frequency(std::int64_t bin, std::int64_t n) {
  return static_cast<double>(bin <= n / 2 ? bin : bin - n);
}

// The released code: a disc (and a ring counted twice) around index (H/2, W/2) of the unshifted spectrum, in
// float32.
FM_HOST_DEVICE inline double official_gain(const Mask& m, std::int64_t bin_y, std::int64_t bin_x) {
  const std::int64_t dy = bin_y - m.height / 2;
  const std::int64_t dx = bin_x - m.width / 2;
  const float distance = std::sqrt(static_cast<float>(dy * dy + dx * dx));
  return (distance <= static_cast<float>(m.edge0) ? 1.0 : 0.0) +
         (distance == static_cast<float>(m.edge1) ? 1.0 : 0.0);
}

// sqrt(squared) < edge, to the last bit; the root is taken only where the squares are too close to tell.
FM_HOST_DEVICE inline bool is_below(double squared, double edge) {
  const double edge_squared = edge * edge;
  if (squared < edge_squared * (1.0 - 4e-15)) return true;
  if (squared > edge_squared * (1.0 + 4e-15)) return false;
  return std::sqrt(squared) < edge;
}

FM_HOST_DEVICE inline bool is_smooth(MaskKind kind) {
  switch (kind) {
#define FM_CASE(kind, ...) case MaskKind::kind:
    FM_SMOOTH_MASKS(FM_CASE)
#undef FM_CASE
    return true;
    default:
      return false;
  }
}

// What the gain of a smooth mask is made of. A GPU multiplies doubles much faster than it divides or converts
// them, so that is done here, once.
struct SmoothMask {
  explicit SmoothMask(const Mask& m) : SmoothMask(m, exponent_of(m)) {}

  template <typename Real>
  FM_HOST_DEVICE Real gain(double r2) const;

  MaskKind kind;
  double inverse_square;  // of D0 / 2^e, where e is 0 but for exponent_of()
  double power_of_scale;  // 2^(-2 e order), at most 1e38, beyond which a gain is 1
  unsigned whole;         // part of the order
  double rest;

 private:
  SmoothMask(const Mask& m, int exponent)
      : kind(m.kind),
        inverse_square(1.0 / (std::ldexp(m.edge0, -exponent) * std::ldexp(m.edge0, -exponent))),
        power_of_scale(std::min(std::exp2(-2.0 * exponent * m.order), 1e38)),
        whole(static_cast<unsigned>(std::min(m.order, 4e9))),
        rest(m.order - whole) {}

  // Of a D0 whose square would leave the range of double, although its power by a small order does not. With
  // a larger order all gains, and a Gaussian's, are 0 or 1 to the last bit whatever the square is rounded to.
  static int exponent_of(const Mask& m) {
    int exponent = 0;
    std::frexp(m.edge0, &exponent);
    return m.kind == MaskKind::kButterworth && m.order <= 1 && std::abs(exponent) > 300 ? exponent : 0;
  }
};

// s^order / (1 + s^order). In float alone, the rounding of `s` would count `order` times.
template <typename Real>
FM_HOST_DEVICE inline Real butterworth_gain(const SmoothMask& m, double s) {
  double whole_power = 1.0;
  double square = s;
  for (unsigned n = m.whole; n > 0; n /= 2, square *= square) {
    if (n % 2 == 1) whole_power *= square;
  }
  auto power = static_cast<Real>(whole_power);
  if (m.rest > 0.0) power *= std::pow(static_cast<Real>(s), static_cast<Real>(m.rest));
  constexpr auto kMost = static_cast<Real>(1e30);  // infinity times 0, and over infinity, would be no number
  power = std::fmin(std::fmin(power, kMost) * static_cast<Real>(m.power_of_scale), kMost);
  return power / (1 + power);
}

template <typename Real>
FM_HOST_DEVICE inline Real SmoothMask::gain(double r2) const {
  const SmoothMask& m = *this;
  const double s = r2 == 0.0 ? 0.0 : r2 * inverse_square;  // infinite where D0 is 0, but for the mean
  switch (kind) {
#define FM_CASE(kind, name, gain) \
  case MaskKind::kind:            \
    return gain;
    FM_SMOOTH_MASKS(FM_CASE)
#undef FM_CASE
    default:
      return 0;
  }
}

FM_HOST_DEVICE inline double squared_radius(const Mask& m, std::int64_t bin_y, std::int64_t bin_x) {
  const double fy = m.unit_y * signed_frequency(bin_y, m.height);
  const double fx = m.unit_x * signed_frequency(bin_x, m.width);
  return fy * fy + fx * fx;
}

struct Bin {
  std::int64_t y, x;
};

// The bin in the stored half of the spectrum, x <= W/2, that has the gain of any bin: M(k, l) = M(-k, -l).
FM_HOST_DEVICE inline Bin stored_bin(const Mask& m, std::int64_t bin_y, std::int64_t bin_x) {
  if (bin_x <= m.width / 2) return {bin_y, bin_x};
  return {bin_y == 0 ? 0 : m.height - bin_y, m.width - bin_x};
}

// Gain of the other kinds, as mask_gain() has it.
FM_HOST_DEVICE inline double other_gain(const Mask& m, std::int64_t bin_y, std::int64_t bin_x) {
  if (m.kind == MaskKind::kTable) {
    return static_cast<double>(m.table[bin_y * (m.width / 2 + 1) + bin_x]);
  }
  if (m.kind == MaskKind::kOfficial) {
    const std::int64_t mirror_y = bin_y == 0 ? 0 : m.height - bin_y;
    const std::int64_t mirror_x = bin_x == 0 ? 0 : m.width - bin_x;
    return 0.5 * (official_gain(m, bin_y, bin_x) + official_gain(m, mirror_y, mirror_x));
  }
  if (m.kind == MaskKind::kCenter) {
    return (m.axis == 1 ? bin_x : bin_y) == 0 ? 0.0 : 1.0;
  }
  const double r2 = squared_radius(m, bin_y, bin_x);
  if (is_below(r2, m.edge0)) return m.gain0;
  return is_below(r2, m.edge1) ? m.gain1 : m.gain2;
}

// Symmetrised gain (M(k, l) + M(-k, -l)) / 2 at stored bin (bin_y, bin_x); 0 <= bin_y < H, 0 <= bin_x <= W/2.
inline double mask_gain(const Mask& m, std::int64_t bin_y, std::int64_t bin_x) {
  return is_smooth(m.kind) ? SmoothMask(m).gain<double>(squared_radius(m, bin_y, bin_x))
                           : other_gain(m, bin_y, bin_x);
}

}  // namespace freemerge
