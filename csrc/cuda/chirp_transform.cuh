// Transforms of lines in shared memory whose length has a prime factor without a kernel: see chirp.h.
#pragma once

#include "cuda/chirp.h"
#include "cuda/shared_fft.cuh"

namespace freemerge::cuda {

__device__ inline float2 swapped(float2 a) { return make_float2(a.y, a.x); }

// Takes and leaves frequencies and samples in their order, at the first `length` of the lines' points.
template <typename Lines>
__device__ void transform_by_chirp(const Lines& lines, const Passes& points, const float2* roots,
                                   const Chirp& chirp) {
  lines.for_each_butterfly(points.length, 1, [&](Butterfly b) {
    float2& value = lines.at(b.block, b.line);
    value = b.block < chirp.length ? multiply(value, load(chirp.factors + b.block)) : make_float2(0.0f, 0.0f);
  });
  __syncthreads();
  transform<false>(lines, points, roots);
  lines.for_each_butterfly(points.length, 1, [&](Butterfly b) {
    float2& value = lines.at(b.block, b.line);
    value = swapped(multiply(value, load(chirp.spectrum + b.block)));
  });
  __syncthreads();
  undo_transform<false>(lines, points, roots);
  lines.for_each_butterfly(chirp.length, 1, [&](Butterfly b) {
    float2& value = lines.at(b.block, b.line);
    value = multiply(swapped(value), load(chirp.factors + b.block));
  });
  __syncthreads();
}

}  // namespace freemerge::cuda
