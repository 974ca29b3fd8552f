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
    Complex<T> even = a[0], odd{};
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
    a[3] = minus_i(even[3], odd3);
    a[7] = plus_i(even[3], odd3);
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

// Largest radix of a direct pass; larger prime factors go through Bluestein.
inline constexpr int kMaxRadix = 61;

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
          odd[b] = {};
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
T* direct(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  for (int i = 0; i < plan.pass_count; ++i) {
    const FftPass<T>& pass = plan.passes[i];
    switch (pass.radix) {
      case 2:
        stockham_pass<2>(pass, data, work, halves);
        break;
      case 3:
        stockham_pass<3>(pass, data, work, halves);
        break;
      case 4:
        stockham_pass<4>(pass, data, work, halves);
        break;
      case 5:
        stockham_pass<5>(pass, data, work, halves);
        break;
      case 7:
        stockham_pass<7>(pass, data, work, halves);
        break;
      case 8:
        stockham_pass<8>(pass, data, work, halves);
        break;
      case 11:
        stockham_pass<11>(pass, data, work, halves);
        break;
      case 13:
        stockham_pass<13>(pass, data, work, halves);
        break;
      default:
        stockham_pass_odd(pass, data, work, halves);
    }
    T* const result = work;
    work = data;
    data = result;
  }
  return data;
}

template <typename T>
T* bluestein(const Fft<T>& plan, T* data, T* work, Halves<T> halves);

// A transform that keeps natural order: any method but kSplit.
template <typename T>
T* ordered(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  return plan.method == Fft<T>::Method::kDirect ? direct(plan, data, work, halves)
                                                : bluestein(plan, data, work, halves);
}

// Four-step transform in place: columns, twiddles, rows. Each short transform runs in cache.
template <typename T>
T* split_forward(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Fft<T>&rows = *plan.rows, &columns = *plan.columns;
  const std::int64_t n1 = rows.n, n2 = columns.n;
  for (std::int64_t j1 = 0; j1 < n1; ++j1) {
    for (std::int64_t j2 = 0; j2 < n2; ++j2) {
      halves.store(work + kElement<T> * j2, halves.load(data + kElement<T> * (j1 + n1 * j2)));
    }
    const T* column = ordered(columns, work, work + kElement<T> * n2, halves);
    const T* twiddles = plan.twiddles + 2 * n2 * j1;
    for (std::int64_t k2 = 0; k2 < n2; ++k2) {
      halves.store(data + kElement<T> * (j1 + n1 * k2),
                   times(halves.load(column + kElement<T> * k2), twiddles + 2 * k2));
    }
  }
  for (std::int64_t k2 = 0; k2 < n2; ++k2) {
    T* const row = data + kElement<T> * n1 * k2;
    T* const result = ordered(rows, row, work, halves);
    if (result != row) __builtin_memcpy(row, result, static_cast<std::size_t>(n1 * kElement<T>) * sizeof(T));
  }
  return data;
}

// The same steps backwards: from the permuted spectrum to natural order. `halves` are the inverse's.
template <typename T>
T* split_inverse(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Fft<T>&rows = *plan.rows, &columns = *plan.columns;
  const std::int64_t n1 = rows.n, n2 = columns.n;
  for (std::int64_t k2 = 0; k2 < n2; ++k2) {
    T* const row = data + kElement<T> * n1 * k2;
    T* const result = ordered(rows, row, work, halves);
    if (result != row) __builtin_memcpy(row, result, static_cast<std::size_t>(n1 * kElement<T>) * sizeof(T));
  }
  for (std::int64_t j1 = 0; j1 < n1; ++j1) {
    const T* twiddles = plan.twiddles + 2 * n2 * j1;
    for (std::int64_t k2 = 0; k2 < n2; ++k2) {
      halves.store(work + kElement<T> * k2,
                   times(halves.load(data + kElement<T> * (j1 + n1 * k2)), twiddles + 2 * k2));
    }
    const T* column = ordered(columns, work, work + kElement<T> * n2, halves);
    for (std::int64_t j2 = 0; j2 < n2; ++j2) {
      halves.store(data + kElement<T> * (j1 + n1 * j2), halves.load(column + kElement<T> * j2));
    }
  }
  return data;
}

// Spectrum in slots. Returns where the result is: `data` or `work`.
template <typename T>
T* forward(const Fft<T>& plan, T* data, T* work, Halves<T> halves = kForward<T>) {
  return plan.method == Fft<T>::Method::kSplit ? split_forward(plan, data, work, halves)
                                               : ordered(plan, data, work, halves);
}

// From a spectrum in slots. Returns where the result is: `data` or `work`.
template <typename T>
T* inverse(const Fft<T>& plan, T* data, T* work, Halves<T> halves = kInverse<T>) {
  return plan.method == Fft<T>::Method::kSplit ? split_inverse(plan, data, work, halves)
                                               : ordered(plan, data, work, halves);
}

template <typename T>
T* bluestein(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Fft<T>& convolution = *plan.convolution;
  const std::int64_t n = plan.n, m = convolution.n;
  for (std::int64_t j = 0; j < n; ++j) {
    halves.store(work + kElement<T> * j, times(halves.load(data + kElement<T> * j), plan.chirp + 2 * j));
  }
  __builtin_memset(work + kElement<T> * n, 0, static_cast<std::size_t>((m - n) * kElement<T>) * sizeof(T));
  T* const rest = work + kElement<T> * m;
  T* const spectrum = forward(convolution, work, rest, halves);
  for (std::int64_t k = 0; k < m; ++k) {
    T* const element = spectrum + kElement<T> * k;
    halves.store(element, times(halves.load(element), plan.chirp_spectrum + 2 * k));
  }
  const Halves<T> exchanged{halves.im, halves.re};
  const T* const result = inverse(convolution, spectrum, spectrum == work ? rest : work, exchanged);
  for (std::int64_t k = 0; k < n; ++k) {
    halves.store(data + kElement<T> * k, times(halves.load(result + kElement<T> * k), plan.chirp + 2 * k));
  }
  return data;
}

}  // namespace freemerge::FREEMERGE_ISA
