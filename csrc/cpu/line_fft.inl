// Transforms of single lines, compiled once per instruction set. See line_fft.h.
#pragma once

#include "cpu/fft.inl"
#include "cpu/line_fft.h"

namespace freemerge::FREEMERGE_ISA {

template <typename T>
FM_INLINE Complex<T> times(Complex<T> a, Vec<T> c, Vec<T> s) {
  return {a.re * c - a.im * s, a.re * s + a.im * c};
}

// Calls step(k2, twiddles) for every group of kLanes bins k2.
template <typename T, typename Step>
FM_INLINE void for_line_groups(const LineFft<T>& plan, Step step) {
  constexpr std::int64_t n = kLanes<T>;
  const std::int64_t count = plan.columns.n;
  const T* twiddles = plan.twiddles;
  for (std::int64_t group = 0; group < count; group += n, twiddles += 2 * n * (n - 1))
    step(smaller(group, count - n), twiddles);
}

// From the rows a and b, real and imaginary part of a line, to `bins`: plan.n real parts, then as many
// imaginary ones, in a place of plan.bins_size reals. `line` is a place of 2 * plan.n.
template <typename T>
void forward_line(const LineFft<T>& plan, const T* a, const T* b, T* line, T* bins) {
  constexpr int n = kLanes<T>;
  const Strided<T> in{const_cast<T*>(a), n}, out{line, kElement<T>};
  direct<Outer::kNone>(plan.columns, in, out, bins, {{0, b - a}, kForward<T>}, Batch<T>{1, 0, 0, nullptr});
  for_line_groups(plan, [&](std::int64_t k2, const T* twiddles) {
    const T* const from = line + k2 * kElement<T>;
    Vec<T> re[n], im[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) re[i] = load(from + i * kElement<T>);
    transpose<T>(re);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) im[i] = load(from + i * kElement<T> + n);
    transpose<T>(im);
    Complex<T> a[n];
    a[0] = {re[0], im[0]};
#pragma GCC unroll 16
    for (int l = 1; l < n; ++l) {
      const T* const w = twiddles + 2 * n * (l - 1);
      a[l] = times(Complex<T>{re[l], im[l]}, load(w), load(w + n));
    }
    butterfly<n, 1, T>(a, plan.roots);
    T* to = bins + k2;
#pragma GCC unroll 16
    for (int k1 = 0; k1 < n; ++k1, to += plan.columns.n) {
      store(to, a[k1].re);
      store(to + plan.n, a[k1].im);
    }
  });
}

// From `bins` to the rows a and b, unscaled; destroys the bins. The rows may lie in `line`. It is the forward
// transform with real and imaginary parts exchanged.
template <typename T>
void inverse_line(const LineFft<T>& plan, T* bins, T* line, T* a, T* b) {
  constexpr int n = kLanes<T>;
  for_line_groups(plan, [&](std::int64_t k2, const T* twiddles) {
    const T* from = bins + k2;
    Complex<T> a[n];
#pragma GCC unroll 16
    for (int k1 = 0; k1 < n; ++k1, from += plan.columns.n) a[k1] = {load(from + plan.n), load(from)};
    butterfly<n, 1, T>(a, plan.roots);
    Vec<T> re[n], im[n];
    re[0] = a[0].re;
    im[0] = a[0].im;
#pragma GCC unroll 16
    for (int l = 1; l < n; ++l) {
      const T* const w = twiddles + 2 * n * (l - 1);
      const Complex<T> v = times(a[l], load(w), load(w + n));
      re[l] = v.re;
      im[l] = v.im;
    }
    T* const to = line + k2 * kElement<T>;
    transpose<T>(re);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store(to + i * kElement<T>, re[i]);
    transpose<T>(im);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store(to + i * kElement<T> + n, im[i]);
  });
  const Strided<T> in{line, kElement<T>}, out{b, n};
  direct<Outer::kNone>(plan.columns, in, out, bins, {kForward<T>, {0, a - b}}, Batch<T>{1, 0, 0, nullptr});
}

}  // namespace freemerge::FREEMERGE_ISA
