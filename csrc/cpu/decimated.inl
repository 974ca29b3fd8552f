// The three stages of the decimated filter, compiled once per instruction set. See decimated_job.h.
#pragma once

#include "cpu/decimated_job.h"
#include "cpu/spectrum_tiles.inl"
#include "cpu/split_filter.inl"
#include "cpu/window_passes.inl"

namespace freemerge::FREEMERGE_ISA {

inline constexpr std::int64_t kGroup = kLanes<float>;  // coarse rows that share one vector
inline constexpr std::int64_t kBand = 2 * kGroup;      // coarse rows that share one complex transform

// Coarse rows of the matrix's full width, in a ring: row q stays until row q + size is written.
struct Ring {
  float* data;
  std::int64_t pitch;
  std::int64_t size;

  FM_INLINE float* row(std::int64_t q) const { return data + (q + size) % size * pitch; }
};

// One group of finished rows beside the rows still being summed; none where the height stays whole.
FM_INLINE std::int64_t ring_size(const DecimatedJob& job) {
  return job.rows.taps == 0 ? 0 : kGroup + job.rows.taps;
}

// Whole vectors, and never near a multiple of 4 KB, where all rows would share a few cache sets.
FM_INLINE std::int64_t ring_pitch(const DecimatedJob& job) {
  const std::int64_t pitch = (job.width + kGroup - 1) / kGroup * kGroup;
  return pitch % 1024 < 80 ? pitch + 80 : pitch;
}

FM_INLINE Ring ring_in(const DecimatedJob& job, float* work) {
  return {work, ring_pitch(job), ring_size(job)};
}

// The row transform's data and work follow the ring.
FM_INLINE float* transform_in(const DecimatedJob& job, float* work) {
  return work + ring_pitch(job) * ring_size(job);
}

inline std::int64_t work_floats(const DecimatedJob& job) {
  const std::int64_t rows = job.row_fft->n + job.row_fft->work;
  const std::int64_t columns = padded_size(*job.column_fft) + job.column_fft->work;
  return ring_pitch(job) * ring_size(job) + kElement<float> * (rows > columns ? rows : columns);
}

// Rows of the group from `row` on: those of a whole height need not fill the last ones.
FM_INLINE std::int64_t rows_from(const DecimatedJob& job, std::int64_t row) {
  return smaller(kGroup, job.rows.cells - row);
}

FM_INLINE std::int64_t slot_of(const Fft<float>& plan, std::int64_t bin) {
  return plan.slot == nullptr ? bin : plan.slot[bin];
}

inline constexpr auto kTapIndices = std::make_integer_sequence<int, kMaxTaps - kMinTaps + 1>{};

// The passes along the rows axis, by taps and storage type.
struct RowPasses {
  void (*spread_rows)(const DecimatedJob& job, Sweep sweep);
  void (*interpolate_rows)(const DecimatedJob& job, Sweep sweep);
  std::int64_t storage_bytes;
};

template <typename Storage>
FM_INLINE Samples<Storage> samples_of(const DecimatedJob& job) {
  return {static_cast<Storage*>(job.data), job.width, job.stride, job.background, job.mean, job.mean_result};
}
template <int Taps, typename Storage>
void spread_job_rows(const DecimatedJob& job, Sweep sweep) {
  spread_rows<Taps>(samples_of<Storage>(job), job.row_window, sweep);
}
template <int Taps, typename Storage>
void interpolate_job_rows(const DecimatedJob& job, Sweep sweep) {
  interpolate_rows<Taps>(samples_of<Storage>(job), job.row_window, sweep);
}

template <typename Storage, int... Index>
FM_INLINE RowPasses passes_by_taps(int taps, std::integer_sequence<int, Index...>) {
  static constexpr RowPasses table[] = {{spread_job_rows<kMinTaps + Index, Storage>,
                                         interpolate_job_rows<kMinTaps + Index, Storage>,
                                         sizeof(Storage)}...};
  return table[taps - kMinTaps];
}

FM_INLINE RowPasses row_passes(const DecimatedJob& job) {
  if (job.dtype == DType::kBFloat16) return passes_by_taps<bfloat16>(job.rows.taps, kTapIndices);
  if (job.dtype == DType::kFloat16) return passes_by_taps<float16>(job.rows.taps, kTapIndices);
  return passes_by_taps<float>(job.rows.taps, kTapIndices);
}

// Where the height stays whole: the passes along the columns axis between the matrix itself, up to kGroup
// rows from `row` on, and the lanes of a row transform.
struct MatrixPasses {
  void (*spread)(const DecimatedJob& job, std::int64_t row, float* out);
  void (*interpolate)(const DecimatedJob& job, const float* in, std::int64_t row);
};

template <typename Storage>
FM_INLINE MatrixRows<Storage> matrix_rows(const DecimatedJob& job, std::int64_t row) {
  Samples<Storage> samples = samples_of<Storage>(job);
  samples.data += row * samples.stride;
  return {samples, rows_from(job, row)};
}
template <int Taps, typename Storage>
void spread_matrix(const DecimatedJob& job, std::int64_t row, float* out) {
  spread_columns<Taps>(matrix_rows<Storage>(job, row), job.width, job.column_window, job.columns.cells, out,
                       kElement<float>);
}
template <int Taps, typename Storage>
void interpolate_matrix(const DecimatedJob& job, const float* in, std::int64_t row) {
  interpolate_columns<Taps>(in, kElement<float>, job.column_window, job.columns.cells, job.width,
                            matrix_rows<Storage>(job, row));
}

template <typename Storage, int... Index>
FM_INLINE MatrixPasses matrix_passes_by_taps(int taps, std::integer_sequence<int, Index...>) {
  static constexpr MatrixPasses table[] = {
      {spread_matrix<kMinTaps + Index, Storage>, interpolate_matrix<kMinTaps + Index, Storage>}...};
  return table[taps - kMinTaps];
}

FM_INLINE MatrixPasses matrix_passes(const DecimatedJob& job) {
  if (job.dtype == DType::kBFloat16) return matrix_passes_by_taps<bfloat16>(job.columns.taps, kTapIndices);
  if (job.dtype == DType::kFloat16) return matrix_passes_by_taps<float16>(job.columns.taps, kTapIndices);
  return matrix_passes_by_taps<float>(job.columns.taps, kTapIndices);
}

// The samples of cells [first, last), a few rows of V at a time. Negative cells are those before the end of
// the matrix.
inline void sweep_cells(const DecimatedJob& job, Ring ring, std::int64_t first, std::int64_t last,
                        void (*pass)(const DecimatedJob&, Sweep), std::int64_t storage_bytes) {
  const std::int64_t most = job.stride * storage_bytes % 4096 == 0 ? 10 : kSweepRows;
  float* rows[kGroup + 2 * kMaxTaps];
  for (std::int64_t i = 0; i < last - first + job.rows.taps; ++i) rows[i] = ring.row(first + i);
  const std::int64_t wrap = first < 0 ? job.rows.cells : 0;
  const std::int64_t* starts = job.row_window.first + wrap;
  const std::int64_t start = starts[first], count = starts[last] - start;
  const std::int64_t parts = (count + most - 1) / most;
  std::int64_t cell = first, begin = start;
  for (std::int64_t part = 1; part <= parts; ++part) {
    const std::int64_t end = start + count * part / parts;
    while (starts[cell + 1] <= begin) ++cell;
    pass(job, Sweep{begin, end, cell + wrap, rows + (cell - first)});
    begin = end;
  }
}

// Coarse spectrum
// -----------------------------------------------------------------------------------------------

FM_INLINE float* spectrum_at(const DecimatedJob& job, std::int64_t block, std::int64_t row) {
  return job.spectrum + (block * job.rows.cells + row) * kElement<float>;
}

// Whether all columns k0 .. k0 + kGroup - 1 and all rows of a band are there, none of the columns real.
FM_INLINE bool is_whole_block(const DecimatedJob& job, std::int64_t k0, std::int64_t band) {
  const std::int64_t end = k0 + kGroup;
  return k0 > 0 && end <= job.columns.band && 2 * (end - 1) < job.row_fft->n &&
         (band + 1) * kBand <= job.rows.cells;
}

// z holds the transform of A + iB for two groups of real rows; the box's columns of both go to the spectrum,
// rows to elements, twice as large as they are.
inline void split_band(const DecimatedJob& job, const float* z, std::int64_t band) {
  const Fft<float>& plan = *job.row_fft;
  for (std::int64_t k0 = 0, block = 0; k0 < job.columns.band; k0 += kGroup, ++block) {
    if (is_whole_block(job, k0, band)) {
      store_full_block(
          z, [&](int j) { return slot_of(plan, k0 + j); },
          [&](int j) { return slot_of(plan, plan.n - k0 - j); }, spectrum_at(job, block, band * kBand),
          kElement<float>);
      continue;
    }
    FloatVec re[2][kGroup] = {}, im[2][kGroup] = {};
    for (std::int64_t i = 0; i < smaller(kGroup, job.columns.band - k0); ++i) {
      const std::int64_t k = k0 + i;
      const Complex<float> plus = kForward<float>.load(z + kElement<float> * slot_of(plan, k));
      const Complex<float> minus =
          kForward<float>.load(z + kElement<float> * slot_of(plan, k == 0 ? 0 : plan.n - k));
      re[0][i] = plus.re + minus.re;
      im[0][i] = plus.im - minus.im;
      re[1][i] = plus.im + minus.im;
      im[1][i] = minus.re - plus.re;
    }
    for (int half = 0; half < 2; ++half) {
      transpose<float>(re[half]);
      transpose<float>(im[half]);
      const std::int64_t row = band * kBand + half * kGroup;
      float* out = spectrum_at(job, block, row);
      for (std::int64_t i = 0; i < rows_from(job, row); ++i, out += kElement<float>)
        kForward<float>.store(out, {re[half][i], im[half][i]});
    }
  }
}

// The inverse of split_band but for its factor of two; bins outside the box are zero.
inline void join_band(const DecimatedJob& job, std::int64_t band, float* z) {
  const Fft<float>& plan = *job.row_fft;
  for (std::int64_t k0 = 0, block = 0; k0 < job.columns.band; k0 += kGroup, ++block) {
    if (is_whole_block(job, k0, band)) {
      load_full_block(
          z, [&](int j) { return slot_of(plan, k0 + j); },
          [&](int j) { return slot_of(plan, plan.n - k0 - j); }, spectrum_at(job, block, band * kBand),
          kElement<float>);
      continue;
    }
    FloatVec re[2][kGroup] = {}, im[2][kGroup] = {};
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = band * kBand + half * kGroup;
      const float* in = spectrum_at(job, block, row);
      for (std::int64_t i = 0; i < rows_from(job, row); ++i, in += kElement<float>) {
        re[half][i] = load(in);
        im[half][i] = load(in + kGroup);
      }
      transpose<float>(re[half]);
      transpose<float>(im[half]);
    }
    for (std::int64_t i = 0; i < smaller(kGroup, job.columns.band - k0); ++i) {
      const std::int64_t k = k0 + i;
      float* const plus = z + kElement<float> * slot_of(plan, k);
      if (k == 0 || 2 * k == plan.n) {  // the transform of real rows is real there
        kForward<float>.store(plus, {re[0][i], re[1][i]});
        continue;
      }
      kForward<float>.store(plus, {re[0][i] - im[1][i], im[0][i] + re[1][i]});
      kForward<float>.store(z + kElement<float> * slot_of(plan, plan.n - k),
                            {re[0][i] + im[1][i], re[1][i] - im[0][i]});
    }
  }
  for (std::int64_t k = job.columns.band; k <= plan.n - job.columns.band; ++k)
    kForward<float>.store(z + kElement<float> * slot_of(plan, k), Complex<float>{});
}

// Stages
// --------------------------------------------------------------------------------------------------------

using SpreadColumns = void (*)(CoarseRows, std::int64_t, WindowView, std::int64_t, float*, std::int64_t);
using InterpolateColumns = void (*)(const float*, std::int64_t, WindowView, std::int64_t, std::int64_t,
                                    CoarseRows);

template <int... Index>
FM_INLINE SpreadColumns spread_columns_by_taps(int taps, std::integer_sequence<int, Index...>) {
  static constexpr SpreadColumns table[] = {spread_columns<kMinTaps + Index, CoarseRows>...};
  return taps == 0 ? spread_whole_columns : table[taps - kMinTaps];
}
template <int... Index>
FM_INLINE InterpolateColumns interpolate_columns_by_taps(int taps, std::integer_sequence<int, Index...>) {
  static constexpr InterpolateColumns table[] = {interpolate_columns<kMinTaps + Index, CoarseRows>...};
  return taps == 0 ? interpolate_whole_columns : table[taps - kMinTaps];
}

// The whole height, or windows down it.
inline void spread_whole_bands(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band,
                               float* z) {
  const MatrixPasses passes = matrix_passes(job);
  for (std::int64_t band = first_band; band < last_band; ++band) {
    for (std::int64_t half = 0; half < 2; ++half)
      passes.spread(job, band * kBand + half * kGroup, z + half * kGroup);
    forward(*job.row_fft, z, z + kElement<float> * job.row_fft->n);
    split_band(job, z, band);
  }
}

inline void spread_bands(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band,
                         float* work) {
  const Ring ring = ring_in(job, work);
  float* const z = transform_in(job, work);
  if (job.rows.taps == 0) return spread_whole_bands(job, first_band, last_band, z);
  const RowPasses passes = row_passes(job);
  const SpreadColumns spread = spread_columns_by_taps(job.columns.taps, kTapIndices);
  const auto sweep = [&](std::int64_t first, std::int64_t last) {
    sweep_cells(job, ring, first, last, passes.spread_rows, passes.storage_bytes);
  };
  // A coarse row sums over the cells from taps - 1 before it: start there; the rows before it stay unused.
  const std::int64_t halo = job.rows.taps - 1;
  std::int64_t row = first_band * kBand;
  for (std::int64_t q = row - halo; q <= row; ++q)
    __builtin_memset(ring.row(q), 0, static_cast<std::size_t>(ring.pitch) * sizeof(float));
  sweep(row - halo, row);
  for (std::int64_t band = first_band; band < last_band; ++band) {
    for (std::int64_t half = 0; half < 2; ++half, row += kGroup) {
      sweep(row, row + kGroup);
      float* rows[kGroup];
      for (std::int64_t i = 0; i < kGroup; ++i) rows[i] = ring.row(row + i);
      spread(CoarseRows{rows}, job.width, job.column_window, job.columns.cells, z + half * kGroup,
             kElement<float>);
    }
    forward(*job.row_fft, z, z + kElement<float> * job.row_fft->n);
    split_band(job, z, band);
  }
}

// From the last band to the first: what `spread` read last is still in cache.
inline void interpolate_bands(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band,
                              float* work) {
  const Ring ring = ring_in(job, work);
  float* const z = transform_in(job, work);
  const auto coarse_band = [&](std::int64_t band) {
    join_band(job, band, z);
    inverse(*job.row_fft, z, z + kElement<float> * job.row_fft->n);
  };
  if (job.rows.taps == 0) {
    const MatrixPasses passes = matrix_passes(job);
    for (std::int64_t band = last_band; band-- > first_band;) {
      coarse_band(band);
      for (std::int64_t half = 0; half < 2; ++half)
        passes.interpolate(job, z + half * kGroup, band * kBand + half * kGroup);
    }
    return;
  }
  const RowPasses passes = row_passes(job);
  const InterpolateColumns interpolate = interpolate_columns_by_taps(job.columns.taps, kTapIndices);
  const auto coarse_rows = [&](std::int64_t row, std::int64_t half) {
    float* rows[kGroup];
    for (std::int64_t i = 0; i < kGroup; ++i) rows[i] = ring.row(row + i);
    interpolate(z + half * kGroup, kElement<float>, job.column_window, job.columns.cells, job.width,
                CoarseRows{rows});
  };
  // Cells also need the taps - 1 rows after them, which are never more than a band.
  static_assert(kMaxTaps - 1 <= kBand);
  std::int64_t row = last_band * kBand;
  coarse_band(row == job.rows.cells ? 0 : last_band);
  for (std::int64_t half = 0; half * kGroup < job.rows.taps - 1; ++half)
    coarse_rows(row + half * kGroup, half);
  for (std::int64_t band = last_band; band-- > first_band;) {
    coarse_band(band);
    for (std::int64_t half = 2; half-- > 0;) {
      row -= kGroup;
      coarse_rows(row, half);
      sweep_cells(job, ring, row, row + kGroup, passes.interpolate_rows, passes.storage_bytes);
    }
  }
}

// The gains of one block of columns.
struct BlockGain {
  FloatVec factor;
  FloatVec value[3];
  WordVec bound[2];
  const float* row_factor;
  const float* table;  // of row a = 0
  std::int64_t band, half_bin, pitch;

  FM_INLINE BlockGain(const BoxGainView& gain, std::int64_t column, float scale)
      : factor(load(gain.column_factor + column) * scale),
        row_factor(gain.row_factor),
        table(gain.table == nullptr ? nullptr : gain.table + column),
        band(gain.band),
        half_bin(gain.half_bin),
        pitch(gain.pitch) {
    for (int i = 0; i < 3; ++i) value[i] = load(gain.value[i] + column);
    for (int i = 0; i < 2; ++i) bound[i] = load_raw<WordVec>(gain.bound[i] + column);
  }

  FM_INLINE FloatVec at(std::int64_t a) const {
    const std::int64_t magnitude = a < 0 ? -a - half_bin : a;
    if (magnitude >= band) return FloatVec{};
    return difference(a, static_cast<std::uint32_t>(magnitude)) * (factor * row_factor[magnitude]);
  }

  FM_INLINE FloatVec difference(std::int64_t a, std::uint32_t magnitude) const {
    if (table != nullptr) return load(table + a * pitch);
    const WordVec outer = select(bit_cast<WordVec>(magnitude < bound[1]), bit_cast<WordVec>(value[1]),
                                 bit_cast<WordVec>(value[2]));
    return bit_cast<FloatVec>(
        select(bit_cast<WordVec>(magnitude < bound[0]), bit_cast<WordVec>(value[0]), outer));
  }
};

// Around Nyquist of an odd height the coarse columns' frequencies lie half a bin above those of their
// transform: row c is turned by -pi c / cells before it, and back after its inverse.
FM_INLINE void turn_rows(const DecimatedJob& job, float* column, Halves<float> halves) {
  if (job.turns == nullptr) return;
  for (std::int64_t row = 0; row < job.rows.cells; ++row, column += kElement<float>) {
    halves.store(column, times(halves.load(column), job.turns + 2 * row));
  }
}

inline void coarse_mask_blocks(const DecimatedJob& job, std::int64_t first_block, std::int64_t last_block,
                               float* work) {
  const Fft<float>& plan = *job.column_fft;
  constexpr auto real = static_cast<std::int64_t>(sizeof(float));
  const std::int64_t size = plan.n * kElement<float>;
  const bool far = 2 * job.columns.band * plan.n * real > kNearBytes;
  for (std::int64_t block = first_block; block < last_block; ++block) {
    float* const column = spectrum_at(job, block, 0);
    const BlockGain block_gain(job.gain, block * kGroup, job.scale);
    const auto gain = [&](std::int64_t bin) { return block_gain.at(2 * bin <= plan.n ? bin : bin - plan.n); };
    turn_rows(job, column, kForward<float>);
    if (plan.method == Fft<float>::Method::kSplit) {
      float* const rest = work + padded_size(plan) * kElement<float>;
      const Strided<float> columns{column, plan.rows->n * kElement<float>};
      const Upcoming next{reinterpret_cast<std::uintptr_t>(column + size), far && block + 1 < last_block,
                          size * real, 0};
      forward_columns(plan, work, 0, plan.rows->n, columns, kElement<float>, rest);
      filter_split_rows(plan, work, rest, gain, next);
      inverse_columns(plan, work, 0, plan.rows->n, columns, kElement<float>, rest);
    } else {
      forward(plan, column, work);
      for (std::int64_t bin = 0; bin < plan.n; ++bin) {
        multiply(column + kElement<float> * slot_of(plan, bin), gain(bin));
      }
      inverse(plan, column, work);
    }
    turn_rows(job, column, kInverse<float>);
  }
}

inline constexpr DecimatedKernels kDecimatedKernels = {static_cast<int>(kGroup), work_floats, spread_bands,
                                                       coarse_mask_blocks, interpolate_bands};

}  // namespace freemerge::FREEMERGE_ISA
