// How a transform in shared memory goes: in passes of small radices, and with what tables.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "common/mask.h"

namespace freemerge::cuda {

constexpr int kMaxPasses = 16;
constexpr int kLargestCommonRadix =
    16;  // kernels with larger ones, or with 11 and 13, are instances of their own

// Threads of a block of the three kernels at most, so that registers last for two or three blocks on a
// multiprocessor.
constexpr int kRowThreads = 384;
constexpr int kColumnThreads = 160;
constexpr int kUncommonThreads = 192;  // of rows

// Decimation in frequency, in place: after the passes, position p1 M1 + p2 M2 + ... (M1 = n / r1, M2 = M1 /
// r2, ...) holds frequency p1 + r1 (p2 + r2 (p3 + ...)).
struct Passes {
  int length;
  int count;
  int radix[kMaxPasses];

  FM_HOST_DEVICE int last() const { return radix[count - 1]; }
};

// The large radices last. Throws if the length has a factor that is none of `radices`.
Passes passes_of(std::int64_t length, std::initializer_list<int> radices);

// Those of the full form in three kernels, without 43 where it does not divide the length: it is the last
// then.
Passes passes_of(std::int64_t length);

// Kernels with the radices 11, 13 and 43 are instances of their own: they take more registers.
FM_HOST_DEVICE inline bool is_common(int radix) { return radix != 11 && radix != 13 && radix != 43; }
bool are_uncommon(const Passes& passes);

// exp(-2 pi i k / n) for 0 <= k < n
std::vector<float2> unit_roots(std::int64_t n);

// Lines that follow one another in shared memory skip an entry after every 16 and 256, so that neither
// neighbours nor strides of powers of two meet in one bank.
FM_HOST_DEVICE inline int padded(int position) { return position + (position >> 4) + (position >> 8); }

// Where the frequencies 0 .. length - 1 are after the passes, padded.
std::vector<std::uint16_t> frequency_offsets(const Passes& passes);

}  // namespace freemerge::cuda
