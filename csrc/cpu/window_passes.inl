// The windows of the decimated filter, applied along one axis at a time; compiled once per instruction set.
// Along the rows axis the SIMD lanes are neighbouring columns; along the columns axis they are neighbouring
// coarse rows, transposed on the way.
//
// Every pass walks the cells of a window in order with one register accumulator per tap. Passing to the next
// cell shifts the accumulators by one coarse point, so each coarse point is summed over its samples in
// ascending order: the same bits wherever a walk starts and however it is cut into sweeps.
#pragma once

#include <type_traits>

#include "common/window.h"
#include "cpu/simd.h"

namespace freemerge::FREEMERGE_ISA {

// Rows in a sweep: enough to spread the cost of loading the accumulators, few enough for their cache lines to
// stay in L1 until they are used.
inline constexpr std::int64_t kSweepRows = 16;

// Consecutive rows of the matrix. The first lies in `cell`, whose first coarse row is rows[0].
struct Sweep {
  std::int64_t begin, end;
  std::int64_t cell;
  float* const* rows;
};

// The matrix being filtered, seen from its samples: rows of `width` columns, `stride` apart.
template <typename Storage>
struct Samples {
  Storage* data;
  std::int64_t width;
  std::int64_t stride;
  float background;
  float mean, mean_result;  // y = background * (x - mean) + interpolated + mean_result
};

// A sum, where a mean is taken out or comes back: 16-bit storage is rounded more coarsely than a mean
// disturbs.
template <typename Storage>
FM_INLINE FloatVec plus(FloatVec v, float number) {
  if constexpr (std::is_same_v<Storage, float>) return v + number;
  return v;
}

// Bytes between a load and its prefetch in the same row: far enough to hide DRAM, near enough to stay in L1.
inline constexpr std::int64_t kPrefetchBytes = 512;

// Vectors in a panel of columns: as many as leave the accumulators in registers.
template <int Taps>
inline constexpr int kPanelVectors = FREEMERGE_VECTOR_BYTES == 64 ? (Taps <= 6 ? 4 : 3) : (Taps <= 8 ? 2 : 1);

// All lanes of a vector, or the first `count` of them.
struct AllLanes {
  template <typename Storage>
  FM_INLINE FloatVec load(const Storage* p) const {
    return FREEMERGE_ISA::load(p);
  }
  template <typename Storage>
  FM_INLINE void store(Storage* p, FloatVec v) const {
    FREEMERGE_ISA::store(p, v);
  }
};
struct FirstLanes {
  std::int64_t count;
  template <typename Storage>
  FM_INLINE FloatVec load(const Storage* p) const {
    return load_partial(p, count);
  }
  template <typename Storage>
  FM_INLINE void store(Storage* p, FloatVec v) const {
    store_partial(p, v, count);
  }
};

// Accumulators or coarse values of the `Taps` coarse rows a cell touches, `Vectors` wide.
template <int Taps, int Vectors>
struct Panel {
  FloatVec v[Taps][Vectors];

  FM_INLINE void load(float* const* rows, std::int64_t x) {
#pragma GCC unroll 16
    for (int j = 0; j < Taps; ++j) load_row(j, rows[j] + x);
  }
  FM_INLINE void load_row(int j, const float* row) {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) v[j][i] = FREEMERGE_ISA::load(row + i * kLanes<float>);
  }
  FM_INLINE void store(float* const* rows, std::int64_t x) const {
#pragma GCC unroll 16
    for (int j = 0; j < Taps; ++j) store_row(j, rows[j] + x);
  }
  FM_INLINE void store_row(int j, float* row) const {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) FREEMERGE_ISA::store(row + i * kLanes<float>, v[j][i]);
  }
  FM_INLINE void shift() {
#pragma GCC unroll 16
    for (int j = 0; j + 1 < Taps; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) v[j][i] = v[j + 1][i];
    }
  }
  FM_INLINE void clear_last() {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) v[Taps - 1][i] = FloatVec{};
  }
};

// Along the rows axis, spread: coarse[cell + j] += weight[n][j] * sample[n]. The coarse row after a sweep's
// last cell must be there to be written; it starts the next sweep at zero.
template <int Taps, int Vectors, typename Storage, typename Lanes>
FM_INLINE void spread_rows_panel(const Samples<Storage>& samples, WindowView window, Sweep sweep,
                                 std::int64_t x, Lanes lanes) {
  Panel<Taps, Vectors> sums;
  sums.load(sweep.rows, x);
  std::int64_t n = sweep.begin;
  const std::int64_t* next = window.first + sweep.cell + 1;
  float* const* rows = sweep.rows;
  const Storage* in = samples.data + n * samples.stride + x;
  const float mean = samples.mean;
  const float* weights = window.weights + n * Taps;
  for (;; ++next) {
    for (const std::int64_t stop = smaller(*next, sweep.end); n < stop; ++n) {
      FloatVec value[Vectors];
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        value[i] = plus<Storage>(lanes.load(in + i * kLanes<float>), -mean);
        prefetch(reinterpret_cast<const char*>(in + i * kLanes<float>) + kPrefetchBytes);
      }
#pragma GCC unroll 16
      for (int j = 0; j < Taps; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < Vectors; ++i) sums.v[j][i] += value[i] * weights[j];
      }
      in += samples.stride;
      weights += Taps;
    }
    if (n < *next) break;
    sums.store_row(0, rows[0] + x);
    sums.shift();
    sums.clear_last();
    ++rows;
    if (n == sweep.end) break;
  }
  sums.store(rows, x);
}

// Whether results are rounded after a whole sweep: roundings that wait for their sums would keep the
// processor from beginning the next ones.
template <typename Storage>
inline constexpr bool kRoundLater = sizeof(Storage) == 2 && FREEMERGE_VECTOR_BYTES == 32;

// And interpolate: y[n] = background * x[n] + sum_j weight[n][j] * coarse[cell + j].
template <int Taps, int Vectors, typename Storage, typename Lanes>
FM_INLINE void interpolate_rows_panel(const Samples<Storage>& samples, WindowView window, Sweep sweep,
                                      std::int64_t x, Lanes lanes) {
  Panel<Taps, Vectors> coarse;
  coarse.load(sweep.rows, x);
  std::int64_t n = sweep.begin;
  const std::int64_t* next = window.first + sweep.cell + 1;
  float* const* rows = sweep.rows;
  const std::int64_t stride = samples.stride;  // here, or they would be loaded again after every store
  const float background = samples.background, mean = samples.mean, mean_result = samples.mean_result;
  Storage* out = samples.data + n * stride + x;
  const float* weights = window.weights + n * Taps;
  float sums[kRoundLater<Storage> ? kSweepRows * Vectors * kLanes<float> : 1];
  float* sum = sums;
  for (;; ++next) {
    for (const std::int64_t stop = smaller(*next, sweep.end); n < stop; ++n) {
      FloatVec value[Vectors];
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        value[i] = plus<Storage>(lanes.load(out + i * kLanes<float>), -mean) * background;
        prefetch(reinterpret_cast<const char*>(out + i * kLanes<float>) + kPrefetchBytes);
      }
#pragma GCC unroll 16
      for (int j = 0; j < Taps; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < Vectors; ++i) value[i] += coarse.v[j][i] * weights[j];
      }
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        if constexpr (kRoundLater<Storage>) {
          store(sum, value[i]);
          sum += kLanes<float>;
        } else {
          lanes.store(out + i * kLanes<float>, plus<Storage>(value[i], mean_result));
        }
      }
      out += stride;
      weights += Taps;
    }
    if (n == sweep.end) break;
    ++rows;
    coarse.shift();
    coarse.load_row(Taps - 1, rows[Taps - 1] + x);
  }
  if constexpr (kRoundLater<Storage>) {
    out = samples.data + sweep.begin * stride + x;
    for (const float* from = sums; from < sum; out += stride) {
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i, from += kLanes<float>)
        lanes.store(out + i * kLanes<float>, load(from));
    }
  }
}

// Columns x .. width - 1 by panels, then single vectors, then the rest of a vector.
template <int Taps, typename Storage>
void spread_rows(const Samples<Storage>& samples, WindowView window, Sweep sweep) {
  constexpr std::int64_t step = kPanelVectors<Taps> * kLanes<float>;
  std::int64_t x = 0;
  for (; x + step <= samples.width; x += step)
    spread_rows_panel<Taps, kPanelVectors<Taps>>(samples, window, sweep, x, AllLanes{});
  for (; x < samples.width; x += kLanes<float>)
    spread_rows_panel<Taps, 1>(samples, window, sweep, x,
                               FirstLanes{smaller(samples.width - x, kLanes<float>)});
}

template <int Taps, typename Storage>
void interpolate_rows(const Samples<Storage>& samples, WindowView window, Sweep sweep) {
  constexpr std::int64_t step = kPanelVectors<Taps> * kLanes<float>;
  std::int64_t x = 0;
  for (; x + step <= samples.width; x += step)
    interpolate_rows_panel<Taps, kPanelVectors<Taps>>(samples, window, sweep, x, AllLanes{});
  for (; x < samples.width; x += kLanes<float>)
    interpolate_rows_panel<Taps, 1>(samples, window, sweep, x,
                                    FirstLanes{smaller(samples.width - x, kLanes<float>)});
}

// Along the columns axis
// ----------------------------------------------------------------------------------------------------

// Columns transposed at a time: a block of kLanes x kRowBlock values stays in L1.
inline constexpr std::int64_t kRowBlock = 8 * kLanes<float>;

// kLanes rows that are read and written a vector at a time: coarse rows, which are padded to whole vectors,
// ...
struct CoarseRows {
  float* const* rows;

  FM_INLINE FloatVec load(int i, std::int64_t x) const { return FREEMERGE_ISA::load(rows[i] + x); }
  FM_INLINE void store(int i, std::int64_t x, FloatVec v) const { FREEMERGE_ISA::store(rows[i] + x, v); }
};
// ... or `count` rows of the matrix itself, to which the result is added.
template <typename Storage>
struct MatrixRows {
  Samples<Storage> samples;
  std::int64_t count;

  FM_INLINE FloatVec load(int i, std::int64_t x) const {
    if (i >= count) return FloatVec{};
    const Storage* const p = samples.data + i * samples.stride + x;
    prefetch_l2(reinterpret_cast<const char*>(p) + kPrefetchBytes);
    return plus<Storage>(present(p, x), -samples.mean);
  }
  FM_INLINE void store(int i, std::int64_t x, FloatVec v) const {
    if (i >= count) return;
    Storage* const p = samples.data + i * samples.stride + x;
    prefetch_l2(reinterpret_cast<const char*>(p) + kPrefetchBytes);
    const FloatVec y = plus<Storage>(plus<Storage>(present(p, x), -samples.mean) * samples.background + v,
                                     samples.mean_result);
    if (const std::int64_t left = samples.width - x; left < kLanes<float>) return store_partial(p, y, left);
    FREEMERGE_ISA::store(p, y);
  }

 private:
  FM_INLINE FloatVec present(const Storage* p, std::int64_t x) const {
    const std::int64_t left = samples.width - x;
    return left < kLanes<float> ? load_partial(p, left) : FREEMERGE_ISA::load(p);
  }
};

// block[x * kLanes + i] = row i at begin + x.
template <typename Rows>
FM_INLINE void load_transposed(Rows rows, std::int64_t begin, std::int64_t count, float* block) {
  for (std::int64_t x = 0; x < count; x += kLanes<float>) {
    FloatVec tile[kLanes<float>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) tile[i] = rows.load(i, begin + x);
    transpose<float>(tile);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) store(block + (x + i) * kLanes<float>, tile[i]);
  }
}

template <typename Rows>
FM_INLINE void store_transposed(Rows rows, std::int64_t begin, std::int64_t count, const float* block) {
  for (std::int64_t x = 0; x < count; x += kLanes<float>) {
    FloatVec tile[kLanes<float>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) tile[i] = load(block + (x + i) * kLanes<float>);
    transpose<float>(tile);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) rows.store(i, begin + x, tile[i]);
  }
}

// A whole block, out of line: its code is long, and the same for every number of taps.
template <typename Rows>
__attribute__((noinline)) void load_block(Rows rows, std::int64_t begin, std::int64_t count, float* block) {
  load_transposed(rows, begin, count, block);
}
template <typename Rows>
__attribute__((noinline)) void store_block(Rows rows, std::int64_t begin, std::int64_t count,
                                           const float* block) {
  store_transposed(rows, begin, count, block);
}

// kLanes rows of `width` samples each become kLanes lanes of `cells` coarse points, `pitch` floats apart.
template <int Taps, typename Rows>
void spread_columns(Rows rows, std::int64_t width, WindowView window, std::int64_t cells, float* out,
                    std::int64_t pitch) {
  float block[kRowBlock * kLanes<float>];
  FloatVec sums[Taps] = {};
  std::int64_t cell = 0;
  for (std::int64_t begin = 0; begin < width; begin += kRowBlock) {
    const std::int64_t end = smaller(begin + kRowBlock, width);
    load_block(rows, begin, end - begin, block);
    for (std::int64_t n = begin;;) {
      for (const std::int64_t stop = smaller(window.first[cell + 1], end); n < stop; ++n) {
        const FloatVec value = load(block + (n - begin) * kLanes<float>);
        const float* weights = window.weights + n * Taps;
#pragma GCC unroll 16
        for (int j = 0; j < Taps; ++j) sums[j] += value * weights[j];
      }
      if (n < window.first[cell + 1] || cell == cells - 1) break;
      store(out + cell * pitch, sums[0]);
#pragma GCC unroll 16
      for (int j = 0; j + 1 < Taps; ++j) sums[j] = sums[j + 1];
      sums[Taps - 1] = FloatVec{};
      ++cell;
    }
  }
  // The grid is periodic: what spills over its end belongs to its first points.
  store(out + cell * pitch, sums[0]);
#pragma GCC unroll 16
  for (int j = 1; j < Taps; ++j) {
    float* const head = out + (j - 1) * pitch;
    store(head, load(head) + sums[j]);
  }
}

// The adjoint, from coarse points to the samples of kLanes rows.
template <int Taps, typename Rows>
void interpolate_columns(const float* in, std::int64_t pitch, WindowView window, std::int64_t cells,
                         std::int64_t width, Rows rows) {
  float block[kRowBlock * kLanes<float>];
  FloatVec coarse[Taps];
#pragma GCC unroll 16
  for (int j = 0; j < Taps; ++j) coarse[j] = load(in + j * pitch);
  std::int64_t cell = 0;
  for (std::int64_t begin = 0; begin < width; begin += kRowBlock) {
    const std::int64_t end = smaller(begin + kRowBlock, width);
    for (std::int64_t n = begin;;) {
      for (const std::int64_t stop = smaller(window.first[cell + 1], end); n < stop; ++n) {
        const float* weights = window.weights + n * Taps;
        FloatVec even = coarse[0] * weights[0], odd = coarse[1] * weights[1];
#pragma GCC unroll 16
        for (int j = 2; j < Taps; ++j) (j % 2 == 0 ? even : odd) += coarse[j] * weights[j];
        store(block + (n - begin) * kLanes<float>, even + odd);
      }
      if (n == end) break;
      ++cell;
      const std::int64_t last = cell + Taps - 1;
#pragma GCC unroll 16
      for (int j = 0; j + 1 < Taps; ++j) coarse[j] = coarse[j + 1];
      coarse[Taps - 1] = load(in + (last < cells ? last : last - cells) * pitch);
    }
    store_block(rows, begin, end - begin, block);
  }
}

// The same where the axis stays whole: every sample is a coarse point.
inline void spread_whole_columns(CoarseRows rows, std::int64_t width, WindowView, std::int64_t, float* out,
                                 std::int64_t pitch) {
  for (std::int64_t x = 0; x < width; x += kLanes<float>) {
    float block[kLanes<float> * kLanes<float>];
    load_transposed(rows, x, kLanes<float>, block);
    for (std::int64_t i = 0; i < smaller(kLanes<float>, width - x); ++i)
      store(out + (x + i) * pitch, load(block + i * kLanes<float>));
  }
}

inline void interpolate_whole_columns(const float* in, std::int64_t pitch, WindowView, std::int64_t,
                                      std::int64_t width, CoarseRows rows) {
  float block[kLanes<float> * kLanes<float>] = {};
  for (std::int64_t x = 0; x < width; x += kLanes<float>) {
    for (std::int64_t i = 0; i < smaller(kLanes<float>, width - x); ++i)
      store(block + i * kLanes<float>, load(in + (x + i) * pitch));
    store_transposed(rows, x, kLanes<float>, block);
  }
}

}  // namespace freemerge::FREEMERGE_ISA
