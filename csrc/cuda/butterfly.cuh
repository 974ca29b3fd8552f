// Discrete Fourier transforms of 2 to 16 numbers in registers: X[p] = sum_q x[q] exp(-2 pi i p q / R). Fused
// multiply-adds are explicit: what shares a file with a mask is compiled without them.
#pragma once

#include <cmath>

#include "cuda/kernel.cuh"

namespace freemerge::cuda {

__device__ inline float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline float2 subtract(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ inline float2 multiply(float2 a, float2 b) {
  return make_float2(fmaf(a.x, b.x, -(a.y * b.y)), fmaf(a.x, b.y, a.y * b.x));
}
__device__ inline float2 times_minus_i(float2 a) { return make_float2(a.y, -a.x); }

__device__ inline void dft2(float2& a, float2& b) {
  const float2 sum = add(a, b);
  b = subtract(a, b);
  a = sum;
}

__device__ inline void dft4(float2& a, float2& b, float2& c, float2& d) {
  dft2(a, c);
  dft2(b, d);
  d = times_minus_i(d);
  dft2(a, b);
  dft2(c, d);
  const float2 second = c;  // bit-reversed so far
  c = b;
  b = second;
}

// Odd R: pairs of inputs from both ends share their products with cosines and sines.
template <int R>
__device__ inline void dft_odd(float2 (&x)[R], const float (&cosines)[R / 2 + 1],
                               const float (&sines)[R / 2 + 1]) {
  float2 sums[R / 2 + 1];
  float2 differences[R / 2 + 1];
  float2 total = x[0];
#pragma unroll
  for (int q = 1; q <= R / 2; ++q) {
    sums[q] = add(x[q], x[R - q]);
    differences[q] = subtract(x[q], x[R - q]);
    total = add(total, sums[q]);
  }
  const float2 first = x[0];
  x[0] = total;
#pragma unroll
  for (int p = 1; p <= R / 2; ++p) {
    float2 even = first;
    float2 odd = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int q = 1; q <= R / 2; ++q) {
      const int turn = p * q % R;
      const float cosine = cosines[turn <= R / 2 ? turn : R - turn];
      const float sine = turn <= R / 2 ? sines[turn] : -sines[R - turn];
      even.x = fmaf(cosine, sums[q].x, even.x);
      even.y = fmaf(cosine, sums[q].y, even.y);
      odd.x = fmaf(sine, differences[q].x, odd.x);
      odd.y = fmaf(sine, differences[q].y, odd.y);
    }
    x[p] = add(even, times_minus_i(odd));
    x[R - p] = subtract(even, times_minus_i(odd));
  }
}

template <int R>
__device__ inline void dft(float2 (&x)[R]) {
  if constexpr (R == 2) {
    dft2(x[0], x[1]);
  } else if constexpr (R == 3) {
    constexpr float cosines[] = {1.0f, -0.5f};
    constexpr float sines[] = {0.0f, 0.866025403784438647f};
    dft_odd<3>(x, cosines, sines);
  } else if constexpr (R == 4) {
    dft4(x[0], x[1], x[2], x[3]);
  } else if constexpr (R == 5) {
    constexpr float cosines[] = {1.0f, 0.309016994374947424f, -0.809016994374947424f};
    constexpr float sines[] = {0.0f, 0.951056516295153572f, 0.587785252292473129f};
    dft_odd<5>(x, cosines, sines);
  } else if constexpr (R == 7) {
    constexpr float cosines[] = {1.0f, 0.623489801858733531f, -0.222520933956314404f, -0.900968867902419126f};
    constexpr float sines[] = {0.0f, 0.781831482468029809f, 0.974927912181823607f, 0.433883739117558120f};
    dft_odd<7>(x, cosines, sines);
  } else if constexpr (R == 16) {
    // Four times four: x[4 q + s] -> X[p + 4 t].
    constexpr float kCos1 = 0.923879532511286756f;
    constexpr float kSin1 = 0.382683432365089772f;
    constexpr float kRoot = 0.707106781186547524f;
    const float2 roots[10] = {{1.0f, 0.0f},  {kCos1, -kSin1},  {kRoot, -kRoot},  {kSin1, -kCos1},
                              {0.0f, -1.0f}, {-kSin1, -kCos1}, {-kRoot, -kRoot}, {-kCos1, -kSin1},
                              {-1.0f, 0.0f}, {-kCos1, kSin1}};
#pragma unroll
    for (int s = 0; s < 4; ++s) dft4(x[s], x[4 + s], x[8 + s], x[12 + s]);
#pragma unroll
    for (int p = 1; p < 4; ++p) {
#pragma unroll
      for (int s = 1; s < 4; ++s) x[4 * p + s] = multiply(x[4 * p + s], roots[p * s]);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) dft4(x[4 * p], x[4 * p + 1], x[4 * p + 2], x[4 * p + 3]);
    // x[4 p + t] holds X[p + 4 t]
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int t = 0; t < p; ++t) {
        const float2 other = x[4 * p + t];
        x[4 * p + t] = x[4 * t + p];
        x[4 * t + p] = other;
      }
    }
  } else {
    static_assert(R == 1, "no transform of this length");
  }
}

}  // namespace freemerge::cuda
