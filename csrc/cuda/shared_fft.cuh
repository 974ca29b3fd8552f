// Transforms of lines in shared memory, pass by pass. The inverse undoes the passes one by one, so nothing
// has to be reordered in between; it runs on numbers with real and imaginary parts swapped, for which it is a
// forward transform.
#pragma once

#include "cuda/butterfly.cuh"
#include "cuda/kernel.cuh"
#include "cuda/passes.h"

namespace freemerge::cuda {

struct Butterfly {
  int line;
  int block;   // of M * R positions
  int within;  // 0 .. M - 1
};

// Lines beside one another, as many as a power of two; neighbouring threads take neighbouring lines.
struct InterleavedLines {
  float2* data;
  int lines_log2;
  int padding_log2;

  static constexpr bool kRootsShared = true;  // by neighbouring threads

  struct Walk {
    float2* first;
    int step;
    __device__ float2& operator[](int i) const { return first[i * step]; }
  };

  // Where the last radix is 16, one position in sixteen is skipped, which keeps its blocks in different
  // banks. All other strides are multiples of 16 then, so offsets remain equally spaced.
  __device__ int offset(int position) const { return (position + (position >> padding_log2)) << lines_log2; }

  __device__ float2& at(int position, int line) const { return data[offset(position) + line]; }

  __device__ Walk walk(int position, int stride, int line) const {
    return {&at(position, line), offset(stride)};
  }

  // Calls visit(butterfly) for each of `count` butterflies of every line.
  template <typename Visit>
  __device__ void for_each_butterfly(int count, int stride, Visit visit) const {
    for (int i = static_cast<int>(threadIdx.x); i < count << lines_log2; i += static_cast<int>(blockDim.x)) {
      const unsigned number = static_cast<unsigned>(i) >> lines_log2;
      const unsigned block = number / static_cast<unsigned>(stride);
      visit(Butterfly{i & ((1 << lines_log2) - 1), static_cast<int>(block),
                      static_cast<int>(number - block * static_cast<unsigned>(stride))});
    }
  }
};

// Lines one after another; neighbouring threads take neighbouring positions.
struct ConsecutiveLines {
  float2* data;
  int lines;
  int pitch;

  static constexpr bool kRootsShared = false;

  struct Walk {
    float2* line;
    int position;
    int stride;
    __device__ float2& operator[](int i) const { return line[padded(position + i * stride)]; }
  };

  __device__ float2& at(int position, int line) const { return data[line * pitch + padded(position)]; }

  __device__ Walk walk(int position, int stride, int line) const {
    return {data + line * pitch, position, stride};
  }

  template <typename Visit>
  __device__ void for_each_butterfly(int count, int stride, Visit visit) const {
    for (int i = static_cast<int>(threadIdx.x); i < lines * count; i += static_cast<int>(blockDim.x)) {
      const unsigned line = static_cast<unsigned>(i) / static_cast<unsigned>(count);
      const unsigned number = static_cast<unsigned>(i) - line * static_cast<unsigned>(count);
      const unsigned block = number / static_cast<unsigned>(stride);
      visit(Butterfly{static_cast<int>(line), static_cast<int>(block),
                      static_cast<int>(number - block * static_cast<unsigned>(stride))});
    }
  }
};

FM_HOST_DEVICE constexpr int highest_power_of_two(int p) {
  int power = 1;
  while (2 * power <= p) power *= 2;
  return power;
}

// x[p] *= w^p. Where every thread has a w of its own, only the powers 1, 2, 4, 8 are looked up, and products
// of them are the others.
template <int R, bool kRootsShared>
__device__ void turn(float2 (&x)[R], const float2* roots, int angle) {
  if constexpr (kRootsShared) {
#pragma unroll
    for (int p = 1; p < R; ++p) x[p] = multiply(x[p], load(roots + angle * p));
  } else {
    float2 powers[R];
#pragma unroll
    for (int p = 1; p < R; ++p) {
      const int high = highest_power_of_two(p);
      powers[p] = p == high ? load(roots + angle * p) : multiply(powers[high], powers[p - high]);
      x[p] = multiply(x[p], powers[p]);
    }
  }
}

// A pass over blocks of `stride` * R positions.
template <int R, bool kInverse, typename Lines>
__device__ void pass(const Lines& lines, const float2* roots, int length, int stride) {
  const int turns = length / (stride * R);
  lines.for_each_butterfly(length / R, stride, [&](Butterfly b) {
    const auto points = lines.walk(b.block * stride * R + b.within, stride, b.line);
    float2 x[R];
#pragma unroll
    for (int q = 0; q < R; ++q) x[q] = points[q];
    if constexpr (R == 43) {  // the last of its passes, which needs no turns
      dft43(x, points);
    } else {
      if (kInverse) turn<R, Lines::kRootsShared>(x, roots, turns * b.within);
      dft(x);
      if (!kInverse) turn<R, Lines::kRootsShared>(x, roots, turns * b.within);
#pragma unroll
      for (int p = 0; p < R; ++p) points[p] = x[p];
    }
  });
  __syncthreads();
}

// kUncommon: also 11 and 13, but not 43, which is left to callers because it is always the last.
template <bool kUncommon, bool kInverse, typename Lines>
__device__ void pass_of_radix(int radix, const Lines& lines, const float2* roots, int length, int stride) {
  if (radix == 16) return pass<16, kInverse>(lines, roots, length, stride);
  if (radix == 8) return pass<8, kInverse>(lines, roots, length, stride);
  if (radix == 4) return pass<4, kInverse>(lines, roots, length, stride);
  if (radix == 2) return pass<2, kInverse>(lines, roots, length, stride);
  if (radix == 3) return pass<3, kInverse>(lines, roots, length, stride);
  if (radix == 5) return pass<5, kInverse>(lines, roots, length, stride);
  if (radix == 7) return pass<7, kInverse>(lines, roots, length, stride);
  if constexpr (kUncommon) {
    if (radix == 13) return pass<13, kInverse>(lines, roots, length, stride);
    if (radix == 11) return pass<11, kInverse>(lines, roots, length, stride);
  }
}

// All passes of a forward transform.
template <bool kUncommon, typename Lines>
__device__ void transform(const Lines& lines, const Passes& passes, const float2* roots) {
  int stride = passes.length;
  for (int i = 0; i < passes.count; ++i) {
    stride /= passes.radix[i];
    pass_of_radix<kUncommon, false>(passes.radix[i], lines, roots, passes.length, stride);
  }
  if constexpr (kUncommon) {
    if (passes.last() == 43) pass<43, false>(lines, roots, passes.length, 1);
  }
}

// The passes of an inverse transform, on swapped numbers in the order that those of transform() leave.
template <bool kUncommon, typename Lines>
__device__ void undo_transform(const Lines& lines, const Passes& passes, const float2* roots) {
  int stride = 1;
  for (int i = passes.count - 1; i >= 0; --i) {
    pass_of_radix<kUncommon, true>(passes.radix[i], lines, roots, passes.length, stride);
    stride *= passes.radix[i];
  }
}

}  // namespace freemerge::cuda
