// What the native tests share: a check that survives release builds, and relative errors.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cpu/features.h"

namespace freemerge::test {

// The instruction sets that this processor has.
inline std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const IsaName& known : kIsaNames) {
    if (known.isa <= detected_isa()) isas.push_back(known.isa);
  }
  return isas;
}

inline void check(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// The same for what is checked a million times: `describe` puts the words together where they are needed.
template <typename Describe, typename = decltype(std::declval<Describe>()())>
void check(bool condition, const Describe& describe) {
  if (!condition) check(false, std::string(describe()));
}

// ||a - b|| / ||b||, or ||a|| where b is zero.
template <typename A, typename B>
double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return std::sqrt(norm > 0 ? difference / norm : difference);
}

}  // namespace freemerge::test
