// How a transform in shared memory goes: in passes of small radices, and with what tables.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "common/mask.h"

namespace freemerge::cuda {

constexpr int kMaxPasses = 16;

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

// How the full form in three kernels transforms a line. Each kernel has an instance for each of these,
// because they take different numbers of registers: passes of common radices, passes with the radices 11, 13
// and 43, and a convolution by passes of common radices (chirp.h).
enum class Transform { kCommon, kUncommon, kChirp };

// The passes of a line's own length if `chirp` is 0, else those of a convolution of so many points.
struct LinePasses {
  Passes passes;
  Transform transform;
};

LinePasses line_passes(std::int64_t length, int chirp);

// exp(-2 pi i k / n) for 0 <= k < n
std::vector<float2> unit_roots(std::int64_t n);

// Lines that follow one another in shared memory skip an entry after every 16 and 256, so that neither
// neighbours nor strides of powers of two meet in one bank.
FM_HOST_DEVICE inline int padded(int position) { return position + (position >> 4) + (position >> 8); }

// Where the frequencies 0 .. length - 1 of a line are after its transform, padded.
std::vector<std::uint16_t> frequency_offsets(std::int64_t length, const LinePasses& line);

}  // namespace freemerge::cuda
