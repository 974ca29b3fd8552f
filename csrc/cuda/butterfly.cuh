// Discrete Fourier transforms of 2 to 16 numbers, and of 43, in registers: X[p] = sum_q x[q] exp(-2 pi i p q
// / R). Fused multiply-adds are explicit: what shares a file with a mask is compiled without them.
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
struct Folded {
  float2 first;
  float2 total;
  float2 sums[R / 2 + 1];
  float2 differences[R / 2 + 1];

  __device__ explicit Folded(const float2 (&x)[R]) : first(x[0]), total(x[0]) {
#pragma unroll
    for (int q = 1; q <= R / 2; ++q) {
      sums[q] = add(x[q], x[R - q]);
      differences[q] = subtract(x[q], x[R - q]);
      total = add(total, sums[q]);
    }
  }
};

// X[p] = even - i odd and X[R - p] = even + i odd
template <int R>
__device__ inline void dft_odd(float2 (&x)[R], const float (&cosines)[R / 2 + 1],
                               const float (&sines)[R / 2 + 1]) {
  const Folded<R> folded(x);
  x[0] = folded.total;
#pragma unroll
  for (int p = 1; p <= R / 2; ++p) {
    float2 even = folded.first;
    float2 odd = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int q = 1; q <= R / 2; ++q) {
      const int turn = p * q % R;
      const float cosine = cosines[turn <= R / 2 ? turn : R - turn];
      const float sine = turn <= R / 2 ? sines[turn] : -sines[R - turn];
      even.x = fmaf(cosine, folded.sums[q].x, even.x);
      even.y = fmaf(cosine, folded.sums[q].y, even.y);
      odd.x = fmaf(sine, folded.differences[q].x, odd.x);
      odd.y = fmaf(sine, folded.differences[q].y, odd.y);
    }
    x[p] = add(even, times_minus_i(odd));
    x[R - p] = subtract(even, times_minus_i(odd));
  }
}

// 43 = the large prime of 11008 = 2^8 * 43. Registers hold 43 numbers, not their transforms too: those go to
// points[p] one by one, first the real parts, then the imaginary ones.
template <typename Points>
__device__ inline void dft43(const float2 (&x)[43], const Points& points) {
  constexpr float cosines[] = {
      1.000000000000000000f,  0.989343368075110252f,  0.957600599908405958f,  0.905448237493146624f,
      0.833997817889877924f,  0.744772182743781874f,  0.639673021558891275f,  0.520940340487930253f,
      0.391104720490155988f,  0.252933382391680672f,  0.109371208377874521f,  -0.036522023057658504f,
      -0.181636850979436354f, -0.322880404771446361f, -0.457242323304638487f, -0.581858915557952661f,
      -0.694074195220633960f, -0.791496488429254019f, -0.872049408143807714f, -0.934016108732547923f,
      -0.976075877555927063f, -0.997332283663551644f};
  constexpr float sines[] = {
      0.000000000000000000f, 0.145601167735004866f, 0.288099099365237588f, 0.424456698875815053f,
      0.551767740770445880f, 0.667318811222239350f, 0.768647139778532051f, 0.853593089037346431f,
      0.920346183569159426f, 0.967483697057425318f, 0.994000975239945905f, 0.999332848370239391f,
      0.983365676829466184f, 0.946439773157609299f, 0.889342148882518946f, 0.813289740735565481f,
      0.719903473757995793f, 0.611173714097849374f, 0.489417847811085438f, 0.357230889801132878f,
      0.217430175581557250f, 0.072995314660907556f};
  const Folded<43> folded(x);
  points[0] = folded.total;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int p = 1; p <= 21; ++p) {
      float even = part == 0 ? folded.first.x : folded.first.y;
      float odd = 0.0f;
#pragma unroll
      for (int q = 1; q <= 21; ++q) {
        const int turn = p * q % 43;
        const float cosine = cosines[turn <= 21 ? turn : 43 - turn];
        const float sine = turn <= 21 ? sines[turn] : -sines[43 - turn];
        even = fmaf(cosine, part == 0 ? folded.sums[q].x : folded.sums[q].y, even);
        odd = fmaf(sine, part == 0 ? folded.differences[q].y : -folded.differences[q].x, odd);
      }
      float& upper = part == 0 ? points[p].x : points[p].y;
      float& lower = part == 0 ? points[43 - p].x : points[43 - p].y;
      upper = even + odd;
      lower = even - odd;
    }
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
  } else if constexpr (R == 8) {
    // Two times four: the even and the odd inputs.
    constexpr float kRoot = 0.707106781186547524f;
    dft4(x[0], x[2], x[4], x[6]);
    dft4(x[1], x[3], x[5], x[7]);
    x[3] = make_float2(kRoot * (x[3].x + x[3].y), kRoot * (x[3].y - x[3].x));
    x[5] = times_minus_i(x[5]);
    x[7] = make_float2(kRoot * (x[7].y - x[7].x), -kRoot * (x[7].x + x[7].y));
#pragma unroll
    for (int p = 0; p < 4; ++p) dft2(x[2 * p], x[2 * p + 1]);
    // X[p] and X[p + 4] lie side by side
    const float2 out[8] = {x[0], x[2], x[4], x[6], x[1], x[3], x[5], x[7]};
#pragma unroll
    for (int p = 0; p < 8; ++p) x[p] = out[p];
  } else if constexpr (R == 11) {
    constexpr float cosines[] = {1.000000000000000000f,  0.841253532831181206f,  0.415415013001886435f,
                                 -0.142314838273285005f, -0.654860733945284990f, -0.959492973614497369f};
    constexpr float sines[] = {0.000000000000000000f, 0.540640817455597555f, 0.909631995354518330f,
                               0.989821441880932795f, 0.755749574354258269f, 0.281732556841429671f};
    dft_odd<11>(x, cosines, sines);
  } else if constexpr (R == 13) {
    constexpr float cosines[] = {1.000000000000000000f, 0.885456025653209911f,  0.568064746731155923f,
                                 0.120536680255323006f, -0.354604887042535455f, -0.748510748171101192f,
                                 -0.970941817426052012f};
    constexpr float sines[] = {0.000000000000000000f, 0.464723172043768507f, 0.822983865893656352f,
                               0.992708874098053973f, 0.935016242685414833f, 0.663122658240795193f,
                               0.239315664287557683f};
    dft_odd<13>(x, cosines, sines);
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
