// The only C++ definition of a frequency mask; its Python twin is python/freemerge/responses/ and a test
// compares the two on every bin. Usable from host and device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FM_HOST_DEVICE __host__ __device__
#else
#define FM_HOST_DEVICE
#endif

namespace freemerge {

// The smooth responses of the radius: X(kind, name in Python, gain), where the gain is an expression of the
// squared radius `r2` and the numbers of the mask `m`, and rises or falls throughout. A line here and a class
// in python/freemerge/responses/ are all it takes to add one.
#define FM_SMOOTH_MASKS(X)                                               \
  X(kButterworth, "butterworth", butterworth_gain(m.edge0, m.order, r2)) \
  X(kGaussian, "gaussian", -std::expm1(-0.5 * r2 / (m.edge0 * m.edge0)))

// The others, which mask_gain() knows.
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

FM_HOST_DEVICE inline double butterworth_gain(double edge, double order, double r2) {
  if (r2 == 0.0) return 0.0;
  if (order != std::floor(order) || order > 8.0)
    return 1.0 / (1.0 + std::pow(edge / std::sqrt(r2), 2.0 * order));
  const double ratio = edge * edge / r2;
  double power = ratio;  // the usual orders cost a GPU much less this way
  for (int i = 1; i < static_cast<int>(order); ++i) power *= ratio;
  return 1.0 / (1.0 + power);
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

// Gain of a smooth kind at a squared radius.
FM_HOST_DEVICE inline double smooth_gain(const Mask& m, double r2) {
  switch (m.kind) {
#define FM_CASE(kind, name, gain) \
  case MaskKind::kind:            \
    return gain;
    FM_SMOOTH_MASKS(FM_CASE)
#undef FM_CASE
    default:
      return 0.0;
  }
}

// Symmetrised gain (M(k, l) + M(-k, -l)) / 2 at stored bin (bin_y, bin_x); 0 <= bin_y < H, 0 <= bin_x <= W/2.
FM_HOST_DEVICE inline double mask_gain(const Mask& m, std::int64_t bin_y, std::int64_t bin_x) {
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
  const double fy = m.unit_y * signed_frequency(bin_y, m.height);
  const double fx = m.unit_x * signed_frequency(bin_x, m.width);
  const double r2 = fy * fy + fx * fx;
  if (is_smooth(m.kind)) return smooth_gain(m, r2);
  if (is_below(r2, m.edge0)) return m.gain0;
  return is_below(r2, m.edge1) ? m.gain1 : m.gain2;
}

}  // namespace freemerge
