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

// Butterflies
// ---------------------------------------------------------------------------------------------------

template <typename T>
FM_INLINE void butterfly4(Complex<T>& a, Complex<T>& b, Complex<T>& c, Complex<T>& d) {
  const Complex<T> even0 = a + c, even1 = a - c, odd0 = b + d, odd1 = b - d;
  a = even0 + odd0;
  b = minus_i(even1, odd1);
  c = even0 - odd0;
  d = plus_i(even1, odd1);
}

// Odd R: sums and differences of the inputs j and R - j, then real rotations. `roots` holds the roots of
// unity of order R * Stride.
template <int R, int Stride, typename T>
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
  const Complex<T> first = a[0];
  a[0] = total;
#pragma GCC unroll 8
  for (int k = 1; k <= half; ++k) {
    Complex<T> even = first, odd = {};
#pragma GCC unroll 8
    for (int j = 1; j <= half; ++j) {
      const T c = roots[2 * Stride * (j * k % R)], s = roots[2 * Stride * (j * k % R) + 1];
      even = {even.re + sum[j].re * c, even.im + sum[j].im * c};
      odd = j == 1 ? Complex<T>{difference[j].re * s, difference[j].im * s}
                   : Complex<T>{odd.re + difference[j].re * s, odd.im + difference[j].im * s};
    }
    a[k] = minus_i(even, odd);
    a[R - k] = plus_i(even, odd);
  }
}

template <int R, int Stride, typename T>
FM_INLINE void butterfly(Complex<T> (&a)[R], const T* roots);

// R = A * B without common factors (Good and Thomas): input (B i + A j) mod R is element (i, j) of an A x B
// grid, output k is its bin (k mod A, k mod B), and there are no twiddles.
template <int A, int B, int Stride, typename T>
FM_INLINE void butterfly_coprime(Complex<T> (&a)[A * B], const T* roots) {
  constexpr int R = A * B;
  Complex<T> grid[A][B];
#pragma GCC unroll 16
  for (int i = 0; i < A; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < B; ++j) grid[i][j] = a[(B * i + A * j) % R];
    butterfly<B, A * Stride, T>(grid[i], roots);
  }
#pragma GCC unroll 16
  for (int j = 0; j < B; ++j) {
    Complex<T> column[A];
#pragma GCC unroll 16
    for (int i = 0; i < A; ++i) column[i] = grid[i][j];
    butterfly<A, B * Stride, T>(column, roots);
#pragma GCC unroll 16
    for (int i = 0; i < A; ++i) grid[i][j] = column[i];
  }
#pragma GCC unroll 16
  for (int k = 0; k < R; ++k) a[k] = grid[k % A][k % B];
}

// R = A * A (Cooley and Tukey).
template <int A, int Stride, typename T>
FM_INLINE void butterfly_square(Complex<T> (&a)[A * A], const T* roots) {
  Complex<T> grid[A][A];
#pragma GCC unroll 16
  for (int j = 0; j < A; ++j) {
    Complex<T> column[A];
#pragma GCC unroll 16
    for (int i = 0; i < A; ++i) column[i] = a[A * i + j];
    butterfly<A, A * Stride, T>(column, roots);
#pragma GCC unroll 16
    for (int k = 0; k < A; ++k) {
      const T c = roots[2 * Stride * j * k], s = -roots[2 * Stride * j * k + 1];
      grid[k][j] = j * k == 0
                       ? column[k]
                       : Complex<T>{column[k].re * c - column[k].im * s, column[k].re * s + column[k].im * c};
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < A; ++k) {
    butterfly<A, A * Stride, T>(grid[k], roots);
#pragma GCC unroll 16
    for (int l = 0; l < A; ++l) a[k + A * l] = grid[k][l];
  }
}

template <typename T>
FM_INLINE void butterfly8(Complex<T> (&a)[8]) {
  butterfly4(a[0], a[2], a[4], a[6]);
  butterfly4(a[1], a[3], a[5], a[7]);
  const T q = static_cast<T>(0.70710678118654752440);
  const Complex<T> even[4] = {a[0], a[2], a[4], a[6]};
  const Complex<T> odd0 = a[1], odd2 = a[5];
  const Complex<T> odd1{(a[3].re + a[3].im) * q, (a[3].im - a[3].re) * q};
  const Complex<T> odd3{(a[7].re - a[7].im) * q, (a[7].re + a[7].im) * q};
  a[0] = even[0] + odd0;
  a[4] = even[0] - odd0;
  a[1] = even[1] + odd1;
  a[5] = even[1] - odd1;
  a[2] = minus_i(even[2], odd2);
  a[6] = plus_i(even[2], odd2);
  a[3] = even[3] - odd3;
  a[7] = even[3] + odd3;
}

template <int R, int Stride, typename T>
FM_INLINE void butterfly(Complex<T> (&a)[R], const T* roots) {
  if constexpr (R == 2) {
    const Complex<T> difference = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = difference;
  } else if constexpr (R == 4) {
    butterfly4(a[0], a[1], a[2], a[3]);
  } else if constexpr (R == 8) {
    butterfly8(a);
  } else if constexpr (R == 9) {
    butterfly_square<3, Stride, T>(a, roots);
  } else if constexpr (R == 16) {
    butterfly_square<4, Stride, T>(a, roots);
  } else if constexpr (R == 12) {
    butterfly_coprime<4, 3, Stride, T>(a, roots);
  } else if constexpr (R % 2 == 0) {
    butterfly_coprime<2, R / 2, Stride, T>(a, roots);
  } else {
    butterfly_odd<R, Stride, T>(a, roots);
  }
}

// Passes
// --------------------------------------------------------------------------------------------------------

// Where elements lie: element e at data + e * step.
template <typename T>
struct Strided {
  T* data;
  std::int64_t step;

  FM_INLINE T* at(std::int64_t element) const { return data + element * step; }
};

// The twiddles between the two halves of a four-step transform are applied by the passes next to them.
enum class Outer { kNone, kLoad, kStore };

// Several transforms of one plan: `count` of them, in_step reals apart (out_step where they go), each with
// its own n outer twiddles, which lie one after the other.
template <typename T>
struct Batch {
  std::int64_t count;
  std::int64_t in_step, out_step;
  const T* outer;
};

// Where the halves of elements lie that a transform reads, and of those that it writes.
template <typename T>
struct Ends {
  Halves<T> in, out;
};

// One butterfly: R elements from `from`, in_step reals apart, to `to`. Pointers run, because R precomputed
// offsets would not fit in registers. Without twiddles, `twiddles` is null.
template <int R, Outer kOuter, bool kTwiddles, typename T>
FM_INLINE void pass_step(const T* from, std::int64_t in_step, T* to, std::int64_t out_step, const T* outer,
                         std::int64_t outer_step, const T* twiddles, const T* roots, Ends<T> ends) {
  Complex<T> a[R];
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j, from += in_step) {
    a[j] = ends.in.load(from);
    if constexpr (kOuter == Outer::kLoad) {
      a[j] = times(a[j], outer);
      outer += outer_step;
    }
  }
  butterfly<R, 1, T>(a, roots);
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j, to += out_step) {
    if (kTwiddles && j > 0) a[j] = times(a[j], twiddles + 2 * (j - 1));
    if constexpr (kOuter == Outer::kStore) {
      a[j] = times(a[j], outer);
      outer += outer_step;
    }
    ends.out.store(to, a[j]);
  }
}

// Loads with outer twiddles are those of a first pass, whose span is 1; stores with them are those of a last
// pass, whose count is 1. The compiler is told, as it need not make loops that never run.
template <int R, Outer kOuter, typename T>
void stockham_pass(const FftPass<T>& pass, Strided<T> in, Strided<T> out, Ends<T> ends, Batch<T> batch) {
  const std::int64_t span = kOuter == Outer::kLoad ? 1 : pass.span;
  const std::int64_t count = kOuter == Outer::kStore ? 1 : pass.count;
  const std::int64_t in_step = span * count * in.step, out_step = span * out.step;
  const std::int64_t outer_step = 2 * span * (kOuter == Outer::kLoad ? count : 1);
  for (std::int64_t b = 0; b < batch.count; ++b) {
    const T* from = in.data;
    T* to = out.data;
    const T* outer = batch.outer;
    for (std::int64_t q = 0; q < span; ++q) {  // the twiddles of p = 0 are 1
      pass_step<R, kOuter, false>(from, in_step, to, out_step, outer, outer_step, pass.twiddles, pass.roots,
                                  ends);
      from += in.step;
      to += out.step;
      outer += 2;
    }
    for (std::int64_t p = 1; p < count; ++p) {
      const T* const twiddles = pass.twiddles + p * 2 * (R - 1);
      to = out.data + span * R * p * out.step;
      for (std::int64_t q = 0; q < span; ++q) {
        pass_step<R, kOuter, true>(from, in_step, to, out_step, outer, outer_step, twiddles, pass.roots,
                                   ends);
        from += in.step;
        to += out.step;
        outer += 2;
      }
    }
    in.data += batch.in_step;
    out.data += batch.out_step;
    if constexpr (kOuter != Outer::kNone) batch.outer += 2 * span * R * count;
  }
}

// Any odd radix: as butterfly_odd, with the sums and differences in memory and a few bins at a time.
template <Outer kOuter, typename T>
void stockham_pass_odd(const FftPass<T>& pass, Strided<T> in, Strided<T> out, Ends<T> ends, Batch<T> batch) {
  const std::int64_t span = pass.span, count = pass.count;
  const int radix = pass.radix, half = (radix - 1) / 2;
  Complex<T> sum[kMaxRadix / 2 + 1], difference[kMaxRadix / 2 + 1];
  for (std::int64_t b = 0; b < batch.count; ++b) {
    for (std::int64_t p = 0; p < count; ++p) {
      const T* twiddles = pass.twiddles + p * 2 * (radix - 1);
      for (std::int64_t q = 0; q < span; ++q) {
        const auto input = [&](int j) {
          const std::int64_t element = q + span * (p + count * j);
          const Complex<T> a = ends.in.load(in.at(element));
          return kOuter == Outer::kLoad ? times(a, batch.outer + 2 * element) : a;
        };
        const auto output = [&](int k, Complex<T> a) {
          const std::int64_t element = q + span * (radix * p + k);
          if (p > 0 && k > 0) a = times(a, twiddles + 2 * (k - 1));
          ends.out.store(out.at(element), kOuter == Outer::kStore ? times(a, batch.outer + 2 * element) : a);
        };
        const Complex<T> first = input(0);
        Complex<T> total = first;
        for (int j = 1; j <= half; ++j) {
          const Complex<T> a = input(j), b = input(radix - j);
          sum[j] = a + b;
          difference[j] = a - b;
          total = total + sum[j];
        }
        output(0, total);
        const T* rotation = pass.roots;
        for (int k0 = 1; k0 <= half; k0 += kRotatedBins) {
          Complex<T> even[kRotatedBins], odd[kRotatedBins];
#pragma GCC unroll 4
          for (int i = 0; i < kRotatedBins; ++i) {
            even[i] = first;
            odd[i] = Complex<T>{};
          }
          for (int j = 1; j <= half; ++j, rotation += 2 * kRotatedBins) {
            const Complex<T> s = sum[j], d = difference[j];
#pragma GCC unroll 4
            for (int i = 0; i < kRotatedBins; ++i) {
              const T cosine = rotation[2 * i], sine = rotation[2 * i + 1];
              even[i] = {even[i].re + s.re * cosine, even[i].im + s.im * cosine};
              odd[i] = {odd[i].re + d.re * sine, odd[i].im + d.im * sine};
            }
          }
          for (int i = 0; i < kRotatedBins && k0 + i <= half; ++i) {
            output(k0 + i, minus_i(even[i], odd[i]));
            output(radix - k0 - i, plus_i(even[i], odd[i]));
          }
        }
      }
    }
    in.data += batch.in_step;
    out.data += batch.out_step;
    if constexpr (kOuter != Outer::kNone) batch.outer += 2 * span * radix;
  }
}

template <Outer kOuter, typename T>
void stockham(const FftPass<T>& pass, Strided<T> in, Strided<T> out, Ends<T> ends, Batch<T> batch) {
  switch (pass.radix) {
    case 2:
      return stockham_pass<2, kOuter>(pass, in, out, ends, batch);
    case 3:
      return stockham_pass<3, kOuter>(pass, in, out, ends, batch);
    case 4:
      return stockham_pass<4, kOuter>(pass, in, out, ends, batch);
    case 5:
      return stockham_pass<5, kOuter>(pass, in, out, ends, batch);
    case 6:
      return stockham_pass<6, kOuter>(pass, in, out, ends, batch);
    case 7:
      return stockham_pass<7, kOuter>(pass, in, out, ends, batch);
    case 8:
      return stockham_pass<8, kOuter>(pass, in, out, ends, batch);
    case 9:
      return stockham_pass<9, kOuter>(pass, in, out, ends, batch);
    case 10:
      return stockham_pass<10, kOuter>(pass, in, out, ends, batch);
    case 11:
      return stockham_pass<11, kOuter>(pass, in, out, ends, batch);
    case 12:
      return stockham_pass<12, kOuter>(pass, in, out, ends, batch);
    case 13:
      return stockham_pass<13, kOuter>(pass, in, out, ends, batch);
    case 16:
      return stockham_pass<16, kOuter>(pass, in, out, ends, batch);
    default:
      return stockham_pass_odd<kOuter>(pass, in, out, ends, batch);
  }
}

// Methods
// -------------------------------------------------------------------------------------------------------

// Outer twiddles go with the first pass's loads or the last one's stores. In and out may be one place: the
// last pass reads and writes the same elements in every butterfly, so a single pass needs no work space.
template <Outer kOuter, typename T>
void direct(const Fft<T>& plan, Strided<T> in, Strided<T> out, T* work, Ends<T> ends, Batch<T> batch) {
  if (plan.pass_count == 1) return stockham<kOuter>(plan.passes[0], in, out, ends, batch);
  for (; batch.count > 0; --batch.count) {
    Strided<T> from = in;
    Halves<T> from_halves = ends.in;
    for (int i = 0; i < plan.pass_count; ++i) {
      const bool last = i == plan.pass_count - 1;
      const Strided<T> to =
          last ? out : Strided<T>{work + (i % 2 == 0 ? 0 : plan.n * kElement<T>), kElement<T>};
      const Ends<T> pass_ends{from_halves, last ? ends.out : kForward<T>};
      const Batch<T> one{1, 0, 0, batch.outer};
      if ((kOuter == Outer::kLoad && i == 0) || (kOuter == Outer::kStore && last)) {
        stockham<kOuter>(plan.passes[i], from, to, pass_ends, one);
      } else {
        stockham<Outer::kNone>(plan.passes[i], from, to, pass_ends, one);
      }
      from = to;
      from_halves = kForward<T>;
    }
    in.data += batch.in_step;
    out.data += batch.out_step;
    if constexpr (kOuter != Outer::kNone) batch.outer += 2 * plan.n;
  }
}

template <typename T>
void bluestein(const Fft<T>& plan, T* data, T* work, Halves<T> halves);

// Transforms that keep natural order: any method but kSplit.
template <Outer kOuter, typename T>
void ordered(const Fft<T>& plan, Strided<T> in, Strided<T> out, T* work, Halves<T> halves, Batch<T> batch) {
  if (plan.method == Fft<T>::Method::kDirect) {
    return direct<kOuter>(plan, in, out, work, {halves, halves}, batch);
  }
  for (; batch.count > 0; --batch.count) {
    for (std::int64_t j = 0; j < plan.n; ++j) {
      const Complex<T> a = halves.load(in.at(j));
      halves.store(work + kElement<T> * j, kOuter == Outer::kLoad ? times(a, batch.outer + 2 * j) : a);
    }
    bluestein(plan, work, work + kElement<T> * plan.n, halves);
    for (std::int64_t k = 0; k < plan.n; ++k) {
      const Complex<T> a = halves.load(work + kElement<T> * k);
      halves.store(out.at(k), kOuter == Outer::kStore ? times(a, batch.outer + 2 * k) : a);
    }
    in.data += batch.in_step;
    out.data += batch.out_step;
    if constexpr (kOuter != Outer::kNone) batch.outer += 2 * plan.n;
  }
}

// The four-step method, each short transform in the first-level cache: forward is columns, twiddles, rows;
// inverse the same steps backwards, from the permuted spectrum to natural order.

// Columns first .. first + count - 1, between the data and `columns`, column_pitch reals from one to the
// next. The data may be padded (see Fft::row_pitch).
template <typename T>
void forward_columns(const Fft<T>& plan, T* data, std::int64_t first, std::int64_t count, Strided<T> columns,
                     std::int64_t column_pitch, T* work) {
  const Strided<T> out{data + first * kElement<T>, kElement<T> * plan.row_pitch};
  const Batch<T> batch{count, column_pitch, kElement<T>, plan.twiddles + 2 * first * plan.columns->n};
  ordered<Outer::kStore>(*plan.columns, columns, out, work, kForward<T>, batch);
}
template <typename T>
void inverse_columns(const Fft<T>& plan, T* data, std::int64_t first, std::int64_t count, Strided<T> columns,
                     std::int64_t column_pitch, T* work) {
  const Strided<T> in{data + first * kElement<T>, kElement<T> * plan.row_pitch};
  const Batch<T> batch{count, kElement<T>, column_pitch, plan.twiddles + 2 * first * plan.columns->n};
  ordered<Outer::kLoad>(*plan.columns, in, columns, work, kInverse<T>, batch);
}

// `count` rows in place, `pitch` elements apart.
template <typename T>
void split_rows(const Fft<T>& plan, T* data, std::int64_t pitch, std::int64_t count, T* work,
                Halves<T> halves) {
  const Strided<T> place{data, kElement<T>};
  const Batch<T> batch{count, kElement<T> * pitch, kElement<T> * pitch, nullptr};
  ordered<Outer::kNone>(*plan.rows, place, place, work, halves, batch);
}

template <Outer kOuter, typename T>
void split_columns(const Fft<T>& plan, T* data, T* work, Halves<T> halves) {
  const Strided<T> first{data, kElement<T> * plan.rows->n};
  const Batch<T> batch{plan.rows->n, kElement<T>, kElement<T>, plan.twiddles};
  ordered<kOuter>(*plan.columns, first, first, work, halves, batch);
}

// In place, from natural order to a spectrum in slots; `work` is plan.work elements.
template <typename T>
void forward(const Fft<T>& plan, T* data, T* work, Halves<T> halves = kForward<T>) {
  if (plan.method == Fft<T>::Method::kSplit) {
    split_columns<Outer::kStore>(plan, data, work, halves);
    split_rows(plan, data, plan.rows->n, plan.columns->n, work, halves);
  } else {
    const Strided<T> place{data, kElement<T>};
    ordered<Outer::kNone>(plan, place, place, work, halves, Batch<T>{1, 0, 0, nullptr});
  }
}

// In place, from a spectrum in slots to natural order.
template <typename T>
void inverse(const Fft<T>& plan, T* data, T* work, Halves<T> halves = kInverse<T>) {
  if (plan.method == Fft<T>::Method::kSplit) {
    split_rows(plan, data, plan.rows->n, plan.columns->n, work, halves);
    split_columns<Outer::kLoad>(plan, data, work, halves);
  } else {
    const Strided<T> place{data, kElement<T>};
    ordered<Outer::kNone>(plan, place, place, work, halves, Batch<T>{1, 0, 0, nullptr});
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
