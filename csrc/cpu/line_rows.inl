// The rows of the full and pruned forms, two at a time as one line; compiled once per instruction set. The
// spectrum is that of full.inl.
#pragma once

#include "cpu/full.inl"
#include "cpu/line_fft.inl"

namespace freemerge::FREEMERGE_ISA {

template <typename T, int... Lane>
FM_INLINE Vec<T> reversed(Vec<T> v, std::integer_sequence<int, Lane...>) {
  return shuffle<(kLanes<T> - 1 - Lane)...>(v, v);
}
template <typename T>
FM_INLINE Vec<T> reversed(Vec<T> v) {
  return reversed<T>(v, std::make_integer_sequence<int, kLanes<T>>{});
}

// Twice the bins of two rows A and B, whose line is A + i B, in a vector of columns.
template <typename T>
struct PairOfBins {
  Vec<T> a_re, a_im, b_re, b_im;
};

// Columns whose bins are neighbours, from `low` on and from `high` downwards.
template <typename T>
FM_INLINE PairOfBins<T> split_neighbours(const T* bins, std::int64_t n, std::int64_t low, std::int64_t high) {
  const T *const z = bins + low, *const mirror = bins + high - (kLanes<T> - 1);
  const Vec<T> re = load(z), im = load(z + n);
  const Vec<T> re2 = reversed<T>(load(mirror)), im2 = reversed<T>(load(mirror + n));
  return {re + re2, im - im2, im + im2, re2 - re};
}

// Blocks from the first on that are whole vectors of neighbouring bins, each next to the one before.
template <typename T>
FM_INLINE std::int64_t run_of_blocks(const Spectrum<T>& spectrum) {
  constexpr std::int64_t n = kLanes<T>;
  std::int64_t blocks = (spectrum.columns - (spectrum.edge ? 1 : 0)) / n;
  while (blocks > 0 && spectrum.low[blocks * n - 1] - spectrum.low[0] != blocks * n - 1) --blocks;
  return blocks;
}

// One of the other blocks.
template <typename T>
struct RaggedBlock {
  std::int64_t columns, imaginary, plain;  // plain: those that are not the edge
  const std::int32_t *low, *high;

  FM_INLINE RaggedBlock(const Spectrum<T>& spectrum, std::int64_t block)
      : columns(spectrum.columns_in(block)),
        imaginary(spectrum.width_of(block) - columns),
        plain(columns - (spectrum.edge && block == spectrum.blocks() - 1 ? 1 : 0)),
        low(spectrum.low + block * kLanes<T>),
        high(spectrum.high + block * kLanes<T>) {}
};

template <typename T>
void split_ragged(const T* re, std::int64_t n, const RaggedBlock<T>& block, T* a, T* b) {
  const T* const im = re + n;
  PairOfBins<T> pair{};
  if (block.plain > 0 && block.low[block.plain - 1] - block.low[0] == block.plain - 1) {
    pair = split_neighbours(re, n, block.low[0], block.high[0]);
  } else {
    for (std::int64_t j = 0; j < block.plain; ++j) {
      const std::int64_t low = block.low[j], high = block.high[j];
      pair.a_re[j] = re[low] + re[high];
      pair.a_im[j] = im[low] - im[high];
      pair.b_re[j] = im[low] + im[high];
      pair.b_im[j] = re[high] - re[low];
    }
  }
  if (const std::int64_t j = block.plain; j < block.columns) {
    const std::int64_t low = block.low[j], high = block.high[j];
    pair.a_re[j] = low < 0 ? 0 : 2 * re[low];
    pair.b_re[j] = low < 0 ? 0 : 2 * im[low];
    pair.a_im[j] = high < 0 ? 0 : 2 * re[high];
    pair.b_im[j] = high < 0 ? 0 : 2 * im[high];
  }
  store_partial(a, pair.a_re, block.columns);
  store_partial(a + block.columns, pair.a_im, block.imaginary);
  store_partial(b, pair.b_re, block.columns);
  store_partial(b + block.columns, pair.b_im, block.imaginary);
}

template <typename T>
void join_ragged(T* re, std::int64_t n, const RaggedBlock<T>& block, const T* a, const T* b, T factor) {
  T* const im = re + n;
  for (std::int64_t j = 0; j < block.columns; ++j) {
    const std::int64_t low = block.low[j], high = block.high[j];
    const T a_re = a[j] * factor, b_re = b[j] * factor;
    const bool real = j >= block.imaginary;
    const T a_im = real ? T{0} : a[block.columns + j] * factor;
    const T b_im = real ? T{0} : b[block.columns + j] * factor;
    if (j < block.plain) {
      re[low] = a_re - b_im;
      im[low] = b_re + a_im;
      re[high] = a_re + b_im;
      im[high] = b_re - a_im;
      continue;
    }
    if (low >= 0) {
      re[low] = a_re;
      im[low] = b_re;
    }
    if (high >= 0) {
      re[high] = a_im;
      im[high] = b_im;
    }
  }
}

// A group of rows, its spectrum and scratch space.
template <typename Storage, typename T>
struct LineGroup {
  const LineFft<T>& plan;
  const Spectrum<T>& spectrum;
  std::int64_t run, rows, stride;
  Storage* data;
  // The blocks of a group may lie across its rows' own memory: then its spectrum goes through scratch space.
  bool mixed;
  T *line, *bins, *spare, *place, *blocks;

  FM_INLINE LineGroup(const LineFft<T>& of, const Signals<Storage>& signals, const Spectrum<T>& spectra,
                      std::int64_t group, T* scratch)
      : plan(of),
        spectrum(spectra),
        run(run_of_blocks(spectra)),
        rows(spectra.signals_in(group)),
        stride(signals.row_stride),
        data(signals.data + group * spectra.group_size() * stride),
        mixed(spectra.tiled &&
              static_cast<const void*>(signals.data) == static_cast<const void*>(spectra.data)),
        line(scratch),
        bins(line + 2 * plan.n),
        spare(bins + plan.bins_size),
        place(spectra.at(group, 0)),
        blocks(mixed ? spare + kElement<T> : place) {}

  // Not a multiple of 4 KB in scratch space.
  FM_INLINE std::int64_t block_pitch() const {
    return mixed ? kElement<T> * (rows + 1) : kElement<T> * (spectrum.tiled ? rows : 1);
  }

  FM_INLINE void copy(bool back) const {
    for (std::int64_t block = 0; block < spectrum.blocks(); ++block) {
      T *const there = place + block * kElement<T> * rows, *const here = blocks + block * block_pitch();
      __builtin_memcpy(back ? there : here, back ? here : there,
                       static_cast<std::size_t>(rows * spectrum.width_of(block)) * sizeof(T));
    }
  }

  // Where the bins of a row in a block go; those of a row that is not there to spare memory.
  FM_INLINE T* at(std::int64_t block, std::int64_t row) const {
    return row < rows ? blocks + block * block_pitch() + row * spectrum.step(block) : spare;
  }
  FM_INLINE std::int64_t pitch_of(std::int64_t row) const { return row < rows ? block_pitch() : 0; }

  FM_INLINE void split(std::int64_t row) const {
    constexpr int lanes = kLanes<T>;
    if (run > 0) {
      T *a = at(0, row), *b = at(0, row + 1);
      const std::int64_t a_pitch = pitch_of(row), b_pitch = pitch_of(row + 1);
      std::int64_t low = spectrum.low[0], high = spectrum.high[0];
      for (std::int64_t block = 0; block < run; ++block) {
        const PairOfBins<T> pair = split_neighbours(bins, plan.n, low, high);
        store(a, pair.a_re);
        store(a + lanes, pair.a_im);
        store(b, pair.b_re);
        store(b + lanes, pair.b_im);
        a += a_pitch, b += b_pitch, low += lanes, high -= lanes;
      }
    }
    for (std::int64_t block = run; block < spectrum.blocks(); ++block)
      split_ragged(bins, plan.n, RaggedBlock<T>(spectrum, block), at(block, row), at(block, row + 1));
  }

  FM_INLINE void join(std::int64_t row, T factor) const {
    constexpr int lanes = kLanes<T>;
    const std::int64_t n = plan.n;
    if (row + 1 == rows) __builtin_memset(spare, 0, static_cast<std::size_t>(kElement<T>) * sizeof(T));
    if (!spectrum.complete) __builtin_memset(bins, 0, static_cast<std::size_t>(2 * n) * sizeof(T));
    if (run > 0) {
      const T *a = at(0, row), *b = at(0, row + 1);
      const std::int64_t a_pitch = pitch_of(row), b_pitch = pitch_of(row + 1);
      T *z = bins + spectrum.low[0], *mirror = bins + spectrum.high[0] - (lanes - 1);
      for (std::int64_t block = 0; block < run; ++block) {
        const Vec<T> a_re = load(a) * factor, a_im = load(a + lanes) * factor;
        const Vec<T> b_re = load(b) * factor, b_im = load(b + lanes) * factor;
        store(z, a_re - b_im);
        store(z + n, b_re + a_im);
        store(mirror, reversed<T>(a_re + b_im));
        store(mirror + n, reversed<T>(b_re - a_im));
        a += a_pitch, b += b_pitch, z += lanes, mirror -= lanes;
      }
    }
    for (std::int64_t block = run; block < spectrum.blocks(); ++block)
      join_ragged(bins, n, RaggedBlock<T>(spectrum, block), at(block, row), at(block, row + 1), factor);
  }
};

template <typename Storage, typename T>
void forward_lines(const LineFft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                   std::int64_t group, T* scratch, Upcoming next) {
  constexpr int lanes = kLanes<T>;
  const LineGroup<Storage, T> own(plan, signals, spectrum, group, scratch);
  for (std::int64_t row = 0; row < own.rows; row += 2) {
    prefetch_part(next, row / 2, (own.rows + 1) / 2);
    const Storage* const a = own.data + row * own.stride;
    const Storage* const b = row + 1 < own.rows ? a + own.stride : a;
    if constexpr (std::is_same_v<Storage, T>) {
      forward_line(plan, a, b, own.line, own.bins);
    } else {
      for (std::int64_t e = 0; e < plan.n; e += lanes) {
        store(own.line + e, load(a + e));
        store(own.line + plan.n + e, load(b + e));
      }
      forward_line(plan, own.line, own.line + plan.n, own.line, own.bins);
    }
    own.split(row);
  }
  if (own.mixed) own.copy(true);
}

template <typename Storage, typename T>
void inverse_lines(const LineFft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                   std::int64_t group, T background, T factor, T* scratch, Upcoming next) {
  constexpr int lanes = kLanes<T>;
  const LineGroup<Storage, T> own(plan, signals, spectrum, group, scratch);
  if (own.mixed) own.copy(false);
  for (std::int64_t row = 0; row < own.rows; row += 2) {
    prefetch_part(next, row / 2, (own.rows + 1) / 2);
    own.join(row, factor);
    Storage* const a = own.data + row * own.stride;
    const bool both = row + 1 < own.rows;
    T *const re = own.line, *const im = own.line + plan.n;
    if constexpr (std::is_same_v<Storage, T>) {
      if (background == 0 && both) {
        inverse_line(plan, own.bins, own.line, a, a + own.stride);
        continue;
      }
    }
    inverse_line(plan, own.bins, own.line, re, im);
    for (std::int64_t e = 0; e < plan.n; e += lanes) {
      store(a + e, combine(load(re + e), a + e, background, T{1}));
      if (both) {
        Storage* const b = a + own.stride;
        store(b + e, combine(load(im + e), b + e, background, T{1}));
      }
    }
  }
}

}  // namespace freemerge::FREEMERGE_ISA
