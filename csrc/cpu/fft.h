// Plans of one-dimensional complex transforms of any length. A plan is immutable and holds no vectors, so
// every thread and every instruction set shares it; the transforms themselves (fft.inl) work on `lanes`
// signals at once, one signal per SIMD lane.
//
// Data layout: element e of a batch is 2 * lanes reals, [re of all lanes | im of all lanes], at e * 2 *
// lanes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/features.h"

namespace freemerge {

// Largest radix of a direct pass; larger prime factors go through Bluestein.
inline constexpr int kMaxRadix = 61;
// Largest one with a kernel of its own; larger ones are odd, and rotate kRotatedBins bins at a time.
inline constexpr int kMaxUnrolledRadix = 16;
inline constexpr int kRotatedBins = 4;

// Columns of a split transform that are worked on together, at most, outside the data (see kSplit).
inline constexpr std::int64_t kColumnsAtOnce = kMaxLanes;

// Whether there are transforms of this length: up to 2^31 - 1, and so the convolution that large prime
// factors take.
bool has_transform(std::int64_t n);

// One Stockham pass: `span` interleaved transforms of length radix * count become radix times as many of
// length `count`.
template <typename T>
struct FftPass {
  int radix;
  std::int64_t count;
  std::int64_t span;
  const T* twiddles;  // count x (radix - 1) pairs (cos, sin); unused when count is 1
  // Pairs (cos, sin): exp(2 pi i j / radix), unused by 2, 4 and 8. For a radix beyond kMaxUnrolledRadix
  // exp(2 pi i j k / radix) for bins k = 1 .. (radix - 1) / 2 by groups of kRotatedBins (the last bin again
  // where a group is not full), in each for inputs j = 1 .. (radix - 1) / 2.
  const T* roots;
};

// Forward transforms are exp(-2 pi i j k / n), inverse ones exp(+...), both unscaled.
template <typename T>
class Fft {
 public:
  // How the length is handled:
  //   kDirect     Stockham passes between two buffers that fit in cache
  //   kSplit      n = rows.n * columns.n, in place by the four-step method; its spectrum is permuted
  //   kBluestein  a circular convolution of a smooth length, for large prime factors
  enum class Method { kDirect, kSplit, kBluestein };

  // Throws std::invalid_argument unless has_transform(n).
  explicit Fft(std::int64_t n);
  Fft(Fft&&) = default;  // not copied: the pointers below are into its own tables
  // Never kSplit, and so in natural order.
  static Fft in_order(std::int64_t n) { return Fft(n, Ordered{}); }

  std::int64_t n;
  Method method;
  // Elements of work space that a transform needs beside its n elements of data.
  std::int64_t work;
  // slot[k] is where the spectrum keeps bin k; null where it keeps it at k.
  const std::int32_t* slot = nullptr;

  // kDirect
  const FftPass<T>* passes = nullptr;
  int pass_count = 0;

  // kSplit: element j1 + rows.n * j2 of the data, bin k2 + columns.n * k1 at slot rows.n * k2 + k1.
  const Fft* rows = nullptr;     // over j1
  const Fft* columns = nullptr;  // over j2
  // From one row to the next where the data are padded: not a multiple of 4 KB, which would put a column into
  // one set of the first-level cache.
  std::int64_t row_pitch = 0;
  const T* twiddles = nullptr;  // exp(-2 pi i j1 k2 / n), pairs (cos, sin), at j1 * columns.n + k2

  // kBluestein
  const Fft* convolution = nullptr;
  const T* chirp = nullptr;           // n pairs of exp(-pi i j^2 / n)
  const T* chirp_spectrum = nullptr;  // spectrum of the conjugate chirp over convolution.n, in its slots

  // Elements of padded data, and where bin k of their spectrum is; any method.
  std::int64_t padded_size() const { return method == Method::kSplit ? columns->n * row_pitch : n; }
  std::int64_t padded_slot(std::int64_t k) const {
    return method == Method::kSplit ? row_pitch * (k % columns->n) + k / columns->n : k;
  }

  std::int64_t nbytes() const;  // of all tables

 private:
  struct Ordered {};
  Fft(std::int64_t n, Ordered);
  void plan_ordered();
  void plan_direct(const std::vector<int>& radices);
  void plan_split(std::int64_t row_length);
  void plan_bluestein();
  const T* keep(std::vector<T> table);

  std::vector<FftPass<T>> pass_storage_;
  std::vector<std::int32_t> slot_storage_;
  std::vector<std::vector<T>> tables_;
  std::vector<std::unique_ptr<Fft>> children_;
};

}  // namespace freemerge
