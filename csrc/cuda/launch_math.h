// Index arithmetic shared by host and device.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace freemerge::cuda {

FM_HOST_DEVICE inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// i modulo n, in 0 .. n - 1, for an i that is at most a few periods outside: a 64-bit division costs a GPU a
// hundred instructions.
FM_HOST_DEVICE inline std::int64_t wrap(std::int64_t i, std::int64_t n) {
  while (i < 0) i += n;
  while (i >= n) i -= n;
  return i;
}

// i modulo n, for 0 <= i < 2 n; an index that exists for larger ones, which only weights of zero ask for.
FM_HOST_DEVICE inline int wrap_ahead(int i, int n) { return i < n ? i : (i < 2 * n ? i - n : 0); }

struct Split {
  std::int64_t quotient;
  std::int64_t remainder;
};

// i = quotient * n + remainder, for an i that is less than n or fits 32 bits: see above.
FM_HOST_DEVICE inline Split split(std::int64_t i, std::int64_t n) {
  if (i < n) return {0, i};
  const auto quotient = static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(n);
  return {quotient, i - quotient * n};
}

}  // namespace freemerge::cuda
