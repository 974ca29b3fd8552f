// Lane-batched transforms, compiled once per instruction set. See fft.h for plans and data layout.
#pragma once

#include "cpu/fft.h"
#include "cpu/simd.h"

namespace freemerge::FREEMERGE_ISA {

template <typename T>
struct Complex {
  Vec<T> re, im;
};

template <typename T>
FM_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename T>
FM_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
// a + i b and a - i b.
template <typename T>
FM_INLINE Complex<T> plus_i(Complex<T> a, Complex<T> b) {
  return {a.re - b.im, a.im + b.re};
}
template <typename T>
FM_INLINE Complex<T> minus_i(Complex<T> a, Complex<T> b) {
  return {a.re + b.im, a.im - b.re};
}
// a times the scalar c + i s, a pair in memory.
template <typename T>
FM_INLINE Complex<T> times(Complex<T> a, const T* pair) {
  const T c = pair[0], s = pair[1];
  return {a.re * c - a.im * s, a.re * s + a.im * c};
}

// Elements of a batch. The inverse transform is the forward one with the real and imaginary halves exchanged,
// which costs nothing: only these two offsets change.
template <typename T>
struct Halves {
  std::int64_t re, im;

  FM_INLINE Complex<T> load(const T* element) const {
    return {FREEMERGE_ISA::load(element + re), FREEMERGE_ISA::load(element + im)};
  }
  FM_INLINE void store(T* element, Complex<T> v) const {
    FREEMERGE_ISA::store(element + re, v.re);
    FREEMERGE_ISA::store(element + im, v.im);
  }
};
template <typename T>
inline constexpr Halves<T> kForward{0, kLanes<T>};
template <typename T>
inline constexpr Halves<T> kInverse{kLanes<T>, 0};

// Reals in one element.
template <typename T>
inline constexpr std::int64_t kElement = 2 * kLanes<T>;

// Butterflies ---------------------------------------------------------------------------------------------------

template <typename T>
FM_INLINE void butterfly4(Complex<T>& a, Complex<T>& b, Complex<T>& c, Complex<T>& d) {
  const Complex<T> even0 = a + c, even1 = a - c, odd0 = b + d, odd1 = b - d;
  a = even0 + odd0;
  b = minus_i(even1, odd1);
  c = even0 - odd0;
  d = plus_i(even1, odd1);
}

// Odd radices: sums and differences of the bins j and R - j, then real rotations.
template <int R, typename T>
FM_INLINE void butterfly_odd(Complex<T> (&a)[R], const T* roots) {
  constexpr int half = (R - 1) / 2;
  Complex<T> sum[half + 1], difference[half + 1];
  Complex<T> total = a[0];
#pragma GCC unroll 8
  for (int j = 1; j <= half; ++j) {
    sum[j] = a[j] + a[R - j];
    difference[j] = a[j] - a[R - j];
    total = total + sum[j];
  }
#pragma GCC unroll 8
  for (int k = 1; k <= half; ++k) {
    Complex<T> even = a[0], odd = {};
#pragma GCC unroll 8
    for (int j = 1; j <= half; ++j) {
      const T c = roots[2 * (j * k % R)], s = roots[2 * (j * k % R) + 1];
      even = {even.re + sum[j].re * c, even.im + sum[j].im * c};
      if (j == 1) {
        odd = {difference[j].re * s, difference[j].im * s};
      } else {
        odd = {odd.re + difference[j].re * s, odd.im + difference[j].im * s};
      }
    }
    a[k] = minus_i(even, odd);
    a[R - k] = plus_i(even, odd);
  }
  a[0] = total;
}

template <int R, typename T>
FM_INLINE void butterfly(Complex<T> (&a)[R], const T* roots) {
  if constexpr (R == 2) {
    const Complex<T> difference = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = difference;
  } else if constexpr (R == 4) {
    butterfly4(a[0], a[1], a[2], a[3]);
  } else if constexpr (R == 8) {
    butterfly4(a[0], a[2], a[4], a[6]);
    butterfly4(a[1], a[3], a[5], a[7]);
    const T q = static_cast<T>(0.70710678118654752440);
    const Complex<T> odd1{(a[3].re + a[3].im) * q, (a[3].im - a[3].re) * q};
    const Complex<T> odd3{(a[7].re - a[7].im) * q, (a[7].re + a[7].im) * q};
    const Complex<T> even[4] = {a[0], a[2], a[4], a[6]};
    const Complex<T> odd0 = a[1], odd2 = a[5];
    a[0] = even[0] + odd0;
    a[4] = even[0] - odd0;
    a[1] = even[1] + odd1;
    a[5] = even[1] - odd1;
    a[2] = minus_i(even[2], odd2);
    a[6] = plus_i(even[2], odd2);
    a[3] = even[3] - odd3;
    a[7] = even[3] + odd3;
  } else {
    butterfly_odd<R, T>(a, roots);
  }
}

// Passes --------------------------------------------------------------------------------------------------------

template <int R, typename T>
void stockham_pass(const FftPass<T>& pass, const T* in, T* out, Halves<T> halves) {
  const std::int64_t span = pass.span, count = pass.count;
  for (std::int64_t p = 0; p < count; ++p) {
    const T* twiddles = pass.twiddles + p * 2 * (R - 1);
    for (std::int64_t q = 0; q < span; ++q) {
      const T* from = in + kElement<T> * (q + span * p);
      T* to = out + kElement<T> * (q + span * R * p);
      Complex<T> a[R];
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) a[j] = halves.load(from + kElement<T> * span * count * j);
      butterfly<R, T>(a, pass.roots);
      halves.store(to, a[0]);
      if (count == 1) {
#pragma GCC unroll 16
        for (int j = 1; j < R; ++j) halves.store(to + kElement<T> * span * j, a[j]);
      } else {
#pragma GCC unroll 16
        for (int j = 1; j < R; ++j)
          halves.store(to + kElement<T> * span * j, times(a[j], twiddles + 2 * (j - 1)));
      }
    }
  }
}

// Any odd radix: as butterfly_odd, with the sums and differences in memory and three bins at a time.
template <typename T>
void stockham_pass_odd(const FftPass<T>& pass, const T* in, T* out, Halves<T> halves) {
  const std::int64_t span = pass.span, count = pass.count;
  const int radix = pass.radix, half = (radix - 1) / 2;
  Complex<T> sum[kMaxRadix / 2 + 1], difference[kMaxRadix / 2 + 1];
  for (std::int64_t p = 0; p < count; ++p) {
    const T* twiddles = pass.twiddles + p * 2 * (radix - 1);
    for (std::int64_t q = 0; q < span; ++q) {
      const T* from = in + kElement<T> * (q + span * p);
      T* to = out + kElement<T> * (q + span * radix * p);
      const std::int64_t step = kElement<T> * span * count;
      const Complex<T> first = halves.load(from);
      Complex<T> total = first;
      for (int j = 1; j <= half; ++j) {
        const Complex<T> a = halves.load(from + step * j), b = halves.load(from + step * (radix - j));
        sum[j] = a + b;
        difference[j] = a - b;
        total = total + sum[j];
      }
      halves.store(to, total);
      constexpr int kBins = 3;
      for (int k0 = 1; k0 <= half; k0 += kBins) {
        Complex<T> even[kBins], odd[kBins];
        int angle[kBins], bin[kBins];
        for (int b = 0; b < kBins; ++b) {
          bin[b] = k0 + b < half ? k0 + b : half;
          angle[b] = 0;
          even[b] = first;
          odd[b] = Complex<T>{};
        }
        for (int j = 1; j <= half; ++j) {
          const Complex<T> s = sum[j], d = difference[j];
#pragma GCC unroll 3
          for (int b = 0; b < kBins; ++b) {
            angle[b] += bin[b];
            if (angle[b] >= radix) angle[b] -= radix;
            const T cosine = pass.roots[2 * angle[b]], sine = pass.roots[2 * angle[b] + 1];
            even[b] = {even[b].re + s.re * cosine, even[b].im + s.im * cosine};
            odd[b] = {odd[b].re + d.re * sine, odd[b].im + d.im * sine};
          }
        }
        for (int b = 0; b < kBins; ++b) {
          const int k = bin[b];
          Complex<T> low = minus_i(even[b], odd[b]), high = plus_i(even[b], odd[b]);
          if (count > 1) {
            low = times(low, twiddles + 2 * (k - 1));
            high = times(high, twiddles + 2 * (radix - k - 1));
          }
          halves.store(to + kElement<T> * span * k, low);
          halves.store(to + kElement<T> * span * (radix - k), high);
        }
      }
    }
  }
}

// Methods -------------------------------------------------------------------------------------------------------

template <typename T>
void stockham(const FftPass<T>& pass, const T* in, T* out, Halves<T> halves) {
  switch (pass.radix) {
    case 2:
      return stockham_pass<2>(pass, in, out, halves);
    case 3:
      return stockham_pass<3>(pass, in, out, halves);
    case 4:
      return stockham_pass<4>(pass, in, out, halves);
    case 5:
      return stockham_pass<5>(pass, in, out, halves);
    case 7:
      return stockham_pass<7>(pass, in, out, halves);
    case 8:
      return stockham_pass<8>(pass, in, out, halves);
    case 11:
      return stockham_pass<11>(pass, in, out, halves);
    case 13:
      return stockham_pass<13>(pass, in, out, halves);
    default:
      return stockham_pass_odd(pass, in, out, halves);
  }
}

template <typename T>
void direct(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  T *from = data, *to = work;
  for (int i = 0; i + 1 < plan.pass_count; ++i) {
    stockham(plan.passes[i], from, to, halves);
    T* const swap = from;
    from = to;
    to = swap;
  }
  // The last pass reads and writes the same elements in every butterfly, so it can run in place.
  if (plan.pass_count > 0) stockham(plan.passes[plan.pass_count - 1], from, data, halves);
}

template <typename T>
void bluestein(const Fft<T>& plan, T* data, T* work, Halves<T> halves);

// A transform that keeps natural order: any method but kSplit.
template <typename T>
void ordered(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  if (plan.method == Fft<T>::Method::kDirect) {
    direct(plan, data, work, halves);
  } else {
    bluestein(plan, data, work, halves);
  }
}

// Four-step transform in place: columns, twiddles, rows. Each short transform runs in cache.
template <typename T>
void split_forward(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Fft<T>&rows = *plan.rows, &columns = *plan.columns;
  const std::int64_t n1 = rows.n, n2 = columns.n;
  for (std::int64_t j1 = 0; j1 < n1; ++j1) {
    for (std::int64_t j2 = 0; j2 < n2; ++j2) {
      halves.store(work + kElement<T> * j2, halves.load(data + kElement<T> * (j1 + n1 * j2)));
    }
    ordered(columns, work, work + kElement<T> * n2, halves);
    const T* twiddles = plan.twiddles + 2 * n2 * j1;
    for (std::int64_t k2 = 0; k2 < n2; ++k2) {
      halves.store(data + kElement<T> * (j1 + n1 * k2),
                   times(halves.load(work + kElement<T> * k2), twiddles + 2 * k2));
    }
  }
  for (std::int64_t k2 = 0; k2 < n2; ++k2) {
    ordered(rows, data + kElement<T> * n1 * k2, work, halves);
  }
}

// The same steps backwards: from the permuted spectrum to natural order. `halves` are the inverse's.
template <typename T>
void split_inverse(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Fft<T>&rows = *plan.rows, &columns = *plan.columns;
  const std::int64_t n1 = rows.n, n2 = columns.n;
  for (std::int64_t k2 = 0; k2 < n2; ++k2) {
    ordered(rows, data + kElement<T> * n1 * k2, work, halves);
  }
  for (std::int64_t j1 = 0; j1 < n1; ++j1) {
    const T* twiddles = plan.twiddles + 2 * n2 * j1;
    for (std::int64_t k2 = 0; k2 < n2; ++k2) {
      halves.store(work + kElement<T> * k2,
                   times(halves.load(data + kElement<T> * (j1 + n1 * k2)), twiddles + 2 * k2));
    }
    ordered(columns, work, work + kElement<T> * n2, halves);
    for (std::int64_t j2 = 0; j2 < n2; ++j2) {
      halves.store(data + kElement<T> * (j1 + n1 * j2), halves.load(work + kElement<T> * j2));
    }
  }
}

// In place, from natural order to a spectrum in slots; `work` is plan.work elements.
template <typename T>
void forward(const Fft<T>& plan, T* data, T* work, Halves<T> halves = kForward<T>) {
  if (plan.method == Fft<T>::Method::kSplit) {
    split_forward(plan, data, work, halves);
  } else {
    ordered(plan, data, work, halves);
  }
}

// In place, from a spectrum in slots to natural order.
template <typename T>
void inverse(const Fft<T>& plan, T* data, T* work, Halves<T> halves = kInverse<T>) {
  if (plan.method == Fft<T>::Method::kSplit) {
    split_inverse(plan, data, work, halves);
  } else {
    ordered(plan, data, work, halves);
  }
}

template <typename T>
void bluestein(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Fft<T>& convolution = *plan.convolution;
  const std::int64_t n = plan.n, m = convolution.n;
  for (std::int64_t j = 0; j < n; ++j) {
    halves.store(work + kElement<T> * j, times(halves.load(data + kElement<T> * j), plan.chirp + 2 * j));
  }
  __builtin_memset(work + kElement<T> * n, 0, static_cast<std::size_t>((m - n) * kElement<T>) * sizeof(T));
  T* const rest = work + kElement<T> * m;
  forward(convolution, work, rest, halves);
  for (std::int64_t k = 0; k < m; ++k) {
    T* const element = work + kElement<T> * k;
    halves.store(element, times(halves.load(element), plan.chirp_spectrum + 2 * k));
  }
  inverse(convolution, work, rest, Halves<T>{halves.im, halves.re});
  for (std::int64_t k = 0; k < n; ++k) {
    halves.store(data + kElement<T> * k, times(halves.load(work + kElement<T> * k), plan.chirp + 2 * k));
  }
}

}  // namespace freemerge::FREEMERGE_ISA
