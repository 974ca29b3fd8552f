#include "cuda/passes.h"

#include <algorithm>
#include <cmath>

#include "common/error.h"

namespace freemerge::cuda {

Passes passes_of(std::int64_t length, std::initializer_list<int> radices) {
  Passes passes{static_cast<int>(length), 0, {}};
  std::int64_t rest = length;
  for (const int radix : radices) {
    for (; rest % radix == 0 && rest > 1 && passes.count < kMaxPasses; rest /= radix)
      passes.radix[passes.count++] = radix;
  }
  require(rest == 1, "a length has a prime factor for which there is no kernel");
  if (passes.count == 0) passes.radix[passes.count++] = 1;
  std::reverse(passes.radix, passes.radix + passes.count);
  return passes;
}

LinePasses line_passes(std::int64_t length, int chirp) {
  if (chirp > 0) return {passes_of(chirp, {16, 8, 4, 2, 7, 5, 3}), Transform::kChirp};
  const Passes passes = passes_of(length, {43, 16, 8, 4, 2, 13, 11, 7, 5, 3});
  const int* end = passes.radix + passes.count;
  require(std::count(passes.radix, end, 43) <= 1, "a length may have the factor 43 once");
  const bool common = std::all_of(passes.radix, end, [](int r) { return r != 11 && r != 13 && r != 43; });
  return {passes, common ? Transform::kCommon : Transform::kUncommon};
}

std::vector<float2> unit_roots(std::int64_t n) {
  constexpr double kPi = 3.14159265358979323846;
  std::vector<float2> roots;
  for (std::int64_t k = 0; k < n; ++k) {
    const double angle = -2.0 * kPi * static_cast<double>(k) / static_cast<double>(n);
    roots.push_back({static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
  }
  return roots;
}

std::vector<std::uint16_t> frequency_offsets(std::int64_t length, const LinePasses& line) {
  const Passes& passes = line.passes;
  std::vector<std::uint16_t> offsets;
  for (int frequency = 0; frequency < static_cast<int>(length); ++frequency) {
    int position = 0;
    int stride = passes.length;
    int rest = frequency;
    for (int i = 0; i < passes.count; ++i) {
      stride /= passes.radix[i];
      position += rest % passes.radix[i] * stride;
      rest /= passes.radix[i];
    }
    if (line.transform == Transform::kChirp) position = frequency;  // which undoes its passes itself
    offsets.push_back(static_cast<std::uint16_t>(padded(position)));
  }
  return offsets;
}

}  // namespace freemerge::cuda
