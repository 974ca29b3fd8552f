// Row-column transforms of real matrices, compiled once per instruction set. See spectrum.h for the layouts.
#pragma once

#include "cpu/spectrum.h"
#include "cpu/spectrum_tiles.inl"
#include "cpu/split_filter.inl"

namespace freemerge::FREEMERGE_ISA {

// Matrix <-> batch
// ------------------------------------------------------------------------------------------------

// Elements first .. first + count - 1 of up to 2 * kLanes rows, count <= kLanes; they go `pitch` reals apart.
template <typename Storage, typename T>
FM_INLINE void load_tile(const Storage* x, std::int64_t stride, std::int64_t rows, std::int64_t count,
                         T* tile, std::int64_t pitch) {
  constexpr int n = kLanes<T>;
  constexpr std::int64_t kAhead = 4 * n;
  for (int half = 0; half < 2; ++half) {
    const std::int64_t present = rows - half * n;
    const Storage* from = x + half * n * stride;
    T* const to = tile + half * n;
    if (present >= n && count == n) {
      transpose_tile<T>(
          [&](int i) {
            prefetch_l2(from + i * stride + kAhead);
            return load(from + i * stride);
          },
          [&](int j, Vec<T> v) { store(to + j * pitch, v); });
    } else {
      transpose_tile<T>(
          [&](int i) { return i < present ? load_partial(from + i * stride, count) : Vec<T>{}; },
          [&](int j, Vec<T> v) {
            if (j < count) store(to + j * pitch, v);
          });
    }
  }
}

template <typename Storage, typename T>
FM_INLINE Vec<T> combine(Vec<T> value, const Storage* old, T background, T factor) {
  return background == 0 ? value * factor : load(old) * background + value * factor;
}
template <typename Storage, typename T>
FM_INLINE Vec<T> combine_partial(Vec<T> value, const Storage* old, std::int64_t count, T background,
                                 T factor) {
  return background == 0 ? value * factor : load_partial(old, count) * background + value * factor;
}

template <typename Storage, typename T>
FM_INLINE void store_tile(const T* tile, std::int64_t pitch, Storage* x, std::int64_t stride,
                          std::int64_t rows, std::int64_t count, T background, T factor) {
  constexpr int n = kLanes<T>;
  for (int half = 0; half < 2; ++half) {
    const std::int64_t present = rows - half * n;
    const T* const from = tile + half * n;
    Storage* to = x + half * n * stride;
    if (present >= n && count == n) {
      transpose_tile<T>([&](int j) { return load(from + j * pitch); },
                        [&](int i, Vec<T> v) {
                          Storage* const target = to + i * stride;
                          store(target, combine(v, target, background, factor));
                        });
    } else {
      transpose_tile<T>([&](int j) { return j < count ? load(from + j * pitch) : Vec<T>{}; },
                        [&](int i, Vec<T> v) {
                          if (i >= present) return;
                          Storage* const target = to + i * stride;
                          store_partial(target, combine_partial(v, target, count, background, factor), count);
                        });
    }
  }
}

// Signals are columns: no transpose, the lanes are contiguous already.
template <typename Storage, typename T>
FM_INLINE void load_columns(const Storage* x, std::int64_t stride, std::int64_t columns, std::int64_t count,
                            T* tile, std::int64_t pitch) {
  constexpr int n = kLanes<T>;
  for (std::int64_t e = 0; e < count; ++e) {
    const Storage* from = x + e * stride;
    T* const to = tile + e * pitch;
    if (columns == 2 * n) {
      store(to, load(from));
      store(to + n, load(from + n));
    } else {
      store(to, load_partial(from, columns < n ? columns : n));
      store(to + n, columns <= n ? Vec<T>{} : load_partial(from + n, columns - n));
    }
  }
}

template <typename Storage, typename T>
FM_INLINE void store_columns(const T* tile, std::int64_t pitch, Storage* x, std::int64_t stride,
                             std::int64_t columns, std::int64_t count, T background, T factor) {
  constexpr int n = kLanes<T>;
  for (std::int64_t e = 0; e < count; ++e) {
    Storage* to = x + e * stride;
    const T* const from = tile + e * pitch;
    if (columns == 2 * n) {
      store(to, combine(load(from), to, background, factor));
      store(to + n, combine(load(from + n), to + n, background, factor));
    } else {
      const std::int64_t low = columns < n ? columns : n;
      store_partial(to, combine_partial(load(from), to, low, background, factor), low);
      if (columns > n) {
        store_partial(to + n, combine_partial(load(from + n), to + n, columns - n, background, factor),
                      columns - n);
      }
    }
  }
}

// Batch <-> spectrum
// ---------------------------------------------------------------------------------------------- The batch
// holds Z = A + i B of two real signals; their spectra are 2 A(k) = Z(k) + conj(Z(-k)) and 2 B(k) = -i (Z(k)
// - conj(Z(-k))). They are kept doubled.

// Any block: fewer columns or signals than lanes, the edge, an absent last imaginary part.
template <typename T>
void store_ragged_block(const T* batch, const Spectrum<T>& spectrum, std::int64_t group, std::int64_t block) {
  constexpr int n = kLanes<T>;
  const std::int64_t columns = spectrum.columns_in(block), rows = spectrum.signals_in(group);
  const std::int64_t imaginary = spectrum.width_of(block) - columns, step = spectrum.step(block);
  Vec<T> a_re[n] = {}, a_im[n] = {}, b_re[n] = {}, b_im[n] = {};
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t column = block * n + j;
    const std::int64_t low = spectrum.low[column], high = spectrum.high[column];
    const T* const z = batch + low * kElement<T>;
    const T* const mirror = batch + high * kElement<T>;
    if (spectrum.edge && column == spectrum.columns - 1) {
      if (low >= 0) {
        a_re[j] = load(z) * T{2};
        b_re[j] = load(z + n) * T{2};
      }
      if (high >= 0) {
        a_im[j] = load(mirror) * T{2};
        b_im[j] = load(mirror + n) * T{2};
      }
    } else {
      a_re[j] = load(z) + load(mirror);
      a_im[j] = load(z + n) - load(mirror + n);
      b_re[j] = load(z + n) + load(mirror + n);
      b_im[j] = load(mirror) - load(z);
    }
  }
  transpose<T>(a_re);
  transpose<T>(a_im);
  transpose<T>(b_re);
  transpose<T>(b_im);
  T* const to = spectrum.at(group, block);
  for (std::int64_t i = 0; i < rows; ++i) {
    store_partial(to + i * step, i < n ? a_re[i] : b_re[i - n], columns);
    store_partial(to + i * step + columns, i < n ? a_im[i] : b_im[i - n], imaginary);
  }
}

template <typename T>
void load_ragged_block(T* batch, const Spectrum<T>& spectrum, std::int64_t group, std::int64_t block) {
  constexpr int n = kLanes<T>;
  const std::int64_t columns = spectrum.columns_in(block), rows = spectrum.signals_in(group);
  const std::int64_t imaginary = spectrum.width_of(block) - columns, step = spectrum.step(block);
  Vec<T> a_re[n] = {}, a_im[n] = {}, b_re[n] = {}, b_im[n] = {};
  const T* const from = spectrum.at(group, block);
  for (std::int64_t i = 0; i < rows; ++i) {
    (i < n ? a_re[i] : b_re[i - n]) = load_partial(from + i * step, columns);
    (i < n ? a_im[i] : b_im[i - n]) = load_partial(from + i * step + columns, imaginary);
  }
  transpose<T>(a_re);
  transpose<T>(a_im);
  transpose<T>(b_re);
  transpose<T>(b_im);
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t column = block * n + j;
    const std::int64_t low = spectrum.low[column], high = spectrum.high[column];
    T* const z = batch + low * kElement<T>;
    T* const mirror = batch + high * kElement<T>;
    if (spectrum.edge && column == spectrum.columns - 1) {
      if (low >= 0) {
        store(z, a_re[j]);
        store(z + n, b_re[j]);
      }
      if (high >= 0) {
        store(mirror, a_im[j]);
        store(mirror + n, b_im[j]);
      }
    } else {
      store(z, a_re[j] - b_im[j]);
      store(z + n, b_re[j] + a_im[j]);
      store(mirror, a_re[j] + b_im[j]);
      store(mirror + n, b_re[j] - a_im[j]);
    }
  }
}

template <typename T>
bool is_full_block(const Spectrum<T>& spectrum, std::int64_t group, std::int64_t block) {
  const bool last = block == spectrum.blocks() - 1;
  return spectrum.width_of(block) == 2 * kLanes<T> && spectrum.signals_in(group) == 2 * kLanes<T> &&
         !(last && spectrum.edge);
}

// Kernels
// -----------------------------------------------------------------------------------------------------------

// The signals of one group, `count` of them.
template <typename Storage>
struct Group {
  Storage* data;
  std::int64_t stride;
  std::int64_t count;
  bool transposed;

  FM_INLINE Group(const Signals<Storage>& signals, std::int64_t first, std::int64_t present)
      : data(signals.data + first * (signals.transposed ? 1 : signals.row_stride)),
        stride(signals.row_stride),
        count(present),
        transposed(signals.transposed) {}

  // Elements first .. first + width - 1 of all signals, `pitch` reals apart; width <= kLanes.
  template <typename T>
  FM_INLINE void load(std::int64_t first, std::int64_t width, T* tile, std::int64_t pitch) const {
    if (transposed) {
      load_columns(data + first * stride, stride, count, width, tile, pitch);
    } else {
      load_tile(data + first, stride, count, width, tile, pitch);
    }
  }
  template <typename T>
  FM_INLINE void store(const T* tile, std::int64_t pitch, std::int64_t first, std::int64_t width,
                       T background, T factor) const {
    if (transposed) {
      store_columns(tile, pitch, data + first * stride, stride, count, width, background, factor);
    } else {
      store_tile(tile, pitch, data + first, stride, count, width, background, factor);
    }
  }
};

// `count` tiles of up to kLanes elements of all signals: tile i begins at element first + i * step and goes
// to `apart` reals times i; each has `shrink` elements less left than the one before. Elements lie `pitch`
// reals apart.
struct Tiles {
  std::int64_t first, step, count;
  std::int64_t left, shrink;
  std::int64_t apart, pitch;
};

// Neighbouring tiles of `length` elements from `first` on.
template <typename T>
FM_INLINE Tiles tiles_of_run(std::int64_t first, std::int64_t length) {
  constexpr std::int64_t n = kLanes<T>;
  return {first, n, (length + n - 1) / n, length, n, n * kElement<T>, kElement<T>};
}

// Not inlined, as the code is long and each is called in three places.
template <typename Storage, typename T>
__attribute__((noinline)) void load_tiles(const Group<Storage>& group, Tiles tiles, T* to) {
  for (; tiles.count > 0; --tiles.count) {
    group.load(tiles.first, smaller(kLanes<T>, tiles.left), to, tiles.pitch);
    tiles.first += tiles.step;
    tiles.left -= tiles.shrink;
    to += tiles.apart;
  }
}
template <typename Storage, typename T>
__attribute__((noinline)) void store_tiles(const T* from, const Group<Storage>& group, Tiles tiles,
                                           T background, T factor) {
  for (; tiles.count > 0; --tiles.count) {
    group.store(from, tiles.pitch, tiles.first, smaller(kLanes<T>, tiles.left), background, factor);
    tiles.first += tiles.step;
    tiles.left -= tiles.shrink;
    from += tiles.apart;
  }
}

// Signals so long that a group of them fills the second-level cache: they are read and written from front to
// back.
inline constexpr std::int64_t kLongSignals = 8192;

// All rows of a split transform, and what is read next with them.
template <typename T>
void all_split_rows(const Fft<T>& plan, T* batch, T* work, Halves<T> halves, Upcoming next) {
  for (std::int64_t row = 0; row < plan.columns->n; ++row) {
    prefetch_part(next, row, plan.columns->n);
    split_rows(plan, batch + row * plan.row_pitch * kElement<T>, 0, 1, work, halves);
  }
}

// From the signals to their transforms in padded slots. A split transform takes its columns straight from the
// signals, so that the batch is written but once before its rows are transformed.
template <typename Storage, typename T>
void transform_signals(const Fft<T>& plan, const Group<Storage>& group, T* batch, T* work, Upcoming next) {
  constexpr std::int64_t n = kLanes<T>;
  if (plan.method != Fft<T>::Method::kSplit) {
    load_tiles(group, tiles_of_run<T>(0, plan.n), batch);
    return forward(plan, batch, work);
  }
  const std::int64_t width = plan.rows->n, length = plan.columns->n;
  if (plan.n > kLongSignals) {
    const std::int64_t row = plan.row_pitch * kElement<T>;
    for (std::int64_t j = 0; j < length; ++j) {
      load_tiles(group, tiles_of_run<T>(width * j, width), batch + row * j);
    }
    forward_columns(plan, batch, 0, width, {batch, row}, kElement<T>, work);
    return split_rows(plan, batch, plan.row_pitch, length, work, kForward<T>);
  }
  const std::int64_t pitch = (length + 1) * kElement<T>;
  for (std::int64_t first = 0; first < width; first += n) {
    const std::int64_t count = smaller(n, width - first);
    load_tiles(group, Tiles{first, width, length, count, 0, kElement<T>, pitch}, work);
    forward_columns(plan, batch, first, count, {work, kElement<T>}, pitch, work + n * pitch);
  }
  all_split_rows(plan, batch, work, kForward<T>, next);
}

template <typename Storage, typename T>
void restore_signals(const Fft<T>& plan, const Group<Storage>& group, T background, T factor, T* batch,
                     T* work, Upcoming next) {
  constexpr std::int64_t n = kLanes<T>;
  if (plan.method != Fft<T>::Method::kSplit) {
    inverse(plan, batch, work);
    return store_tiles(batch, group, tiles_of_run<T>(0, plan.n), background, factor);
  }
  const std::int64_t width = plan.rows->n, length = plan.columns->n;
  if (plan.n > kLongSignals) {
    const std::int64_t row = plan.row_pitch * kElement<T>;
    split_rows(plan, batch, plan.row_pitch, length, work, kInverse<T>);
    inverse_columns(plan, batch, 0, width, {batch, row}, kElement<T>, work);
    for (std::int64_t j = 0; j < length; ++j) {
      store_tiles(batch + row * j, group, tiles_of_run<T>(width * j, width), background, factor);
    }
    return;
  }
  const std::int64_t pitch = (length + 1) * kElement<T>;
  all_split_rows(plan, batch, work, kInverse<T>, next);
  for (std::int64_t first = 0; first < width; first += n) {
    const std::int64_t count = smaller(n, width - first);
    inverse_columns(plan, batch, first, count, {work, kElement<T>}, pitch, work + n * pitch);
    store_tiles(work, group, Tiles{first, width, length, count, 0, kElement<T>, pitch}, background, factor);
  }
}

template <typename Storage, typename T>
void forward_rows(const Fft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                  std::int64_t group, T* scratch, Upcoming next) {
  constexpr int n = kLanes<T>;
  T *const batch = scratch, *const work = scratch + padded_size(plan) * kElement<T>;
  const Group<Storage> source(signals, group * spectrum.group_size(), spectrum.signals_in(group));
  transform_signals(plan, source, batch, work, next);
  for (std::int64_t block = 0; block < spectrum.blocks(); ++block) {
    if (is_full_block(spectrum, group, block)) {
      store_full_block(
          batch, [&](int j) { return spectrum.low[block * n + j]; },
          [&](int j) { return spectrum.high[block * n + j]; }, spectrum.at(group, block),
          spectrum.step(block));
    } else {
      store_ragged_block(batch, spectrum, group, block);
    }
  }
}

template <typename Storage, typename T>
void inverse_rows(const Fft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                  std::int64_t group, T background, T factor, T* scratch, Upcoming next) {
  constexpr int n = kLanes<T>;
  T *const batch = scratch, *const work = scratch + padded_size(plan) * kElement<T>;
  if (!spectrum.complete) {
    __builtin_memset(batch, 0, static_cast<std::size_t>(padded_size(plan) * kElement<T>) * sizeof(T));
  }
  for (std::int64_t block = 0; block < spectrum.blocks(); ++block) {
    if (is_full_block(spectrum, group, block)) {
      load_full_block(
          batch, [&](int j) { return spectrum.low[block * n + j]; },
          [&](int j) { return spectrum.high[block * n + j]; }, spectrum.at(group, block),
          spectrum.step(block));
    } else {
      load_ragged_block(batch, spectrum, group, block);
    }
  }
  const Group<Storage> target(signals, group * spectrum.group_size(), spectrum.signals_in(group));
  restore_signals(plan, target, background, factor, batch, work, next);
}

// One block of columns, element by element along the signals.
template <typename T>
struct BlockElements {
  static constexpr std::int64_t kGroupSize = 2 * kLanes<T>;
  T *full, *last;  // of the first group; of the last one, whose blocks may be smaller
  std::int64_t group_step, step, last_group, columns, imaginary;

  FM_INLINE BlockElements(const Spectrum<T>& spectrum, std::int64_t block)
      : full(spectrum.at(0, block)),
        last(spectrum.at(spectrum.groups() - 1, block)),
        group_step(kGroupSize * spectrum.pitch),
        step(spectrum.step(block)),
        last_group(spectrum.groups() - 1),
        columns(spectrum.columns_in(block)),
        imaginary(spectrum.width_of(block) - columns) {}

  FM_INLINE T* at(std::int64_t element) const {
    const std::int64_t group = element / kGroupSize;
    return (group == last_group ? last : full + group * group_step) + element % kGroupSize * step;
  }

  // How many of the columns of a split with rows of `width` elements can be read where they are, from element
  // 0 or a multiple of the answer on: all of whole groups, whose distance is constant then; 0 for none.
  FM_INLINE std::int64_t together(std::int64_t width) const {
    const bool regular = width % kGroupSize == 0 && full + last_group * group_step == last;
    return regular && imaginary == kLanes<T> ? kGroupSize : 0;
  }
  FM_INLINE Strided<T> column(std::int64_t first, std::int64_t width) const {
    return {at(first), width / kGroupSize * group_step};
  }

  // Elements first, first + pitch, ... (count of them), one after the other.
  FM_INLINE void load(std::int64_t first, std::int64_t pitch, std::int64_t count, T* to) const {
    constexpr int n = kLanes<T>;
    for (std::int64_t i = 0; i < count; ++i, to += kElement<T>) {
      const T* const from = at(first + pitch * i);
      if (imaginary == n) {
        FREEMERGE_ISA::store(to, FREEMERGE_ISA::load(from));
        FREEMERGE_ISA::store(to + n, FREEMERGE_ISA::load(from + n));
      } else {
        FREEMERGE_ISA::store(to, load_partial(from, columns));
        FREEMERGE_ISA::store(to + n, load_partial(from + columns, imaginary));
      }
    }
  }
  FM_INLINE void store(const T* from, std::int64_t first, std::int64_t pitch, std::int64_t count) const {
    constexpr int n = kLanes<T>;
    for (std::int64_t i = 0; i < count; ++i, from += kElement<T>) {
      T* const to = at(first + pitch * i);
      if (imaginary == n) {
        FREEMERGE_ISA::store(to, FREEMERGE_ISA::load(from));
        FREEMERGE_ISA::store(to + n, FREEMERGE_ISA::load(from + n));
      } else {
        store_partial(to, FREEMERGE_ISA::load(from), columns);
        store_partial(to + columns, FREEMERGE_ISA::load(from + n), imaginary);
      }
    }
  }
};

template <typename T>
void apply_gains(const Fft<T>& plan, const BlockGains<T>& gains, T* batch) {
  constexpr int n = kLanes<T>;
  const std::int64_t length = plan.n;
  const auto element = [&](std::int64_t k) { return batch + kElement<T> * (plan.slot ? plan.slot[k] : k); };
  if (!gains.mirrored) {
    for (std::int64_t k = 0; k < length; ++k) multiply(element(k), load(gains.gains + k * n));
    return;
  }
  multiply(element(0), load(gains.gains));
  std::int64_t k = 1;
  for (; k < length - k; ++k) {
    const Vec<T> gain = load(gains.gains + k * n);
    multiply(element(k), gain);
    multiply(element(length - k), gain);
  }
  if (k == length - k) multiply(element(k), load(gains.gains + k * n));
}

// The gains of the edge's lane are complex conjugating ones (see BlockGains): the part that apply_gains
// leaves out is set aside, then added.
template <typename T>
void apply_edge_gains(const Fft<T>& plan, const BlockGains<T>& gains, std::int64_t lane, T* batch) {
  constexpr int n = kLanes<T>;
  const std::int64_t length = plan.n;
  T* const aside = gains.edge_work;
  const auto element = [&](std::int64_t k) {
    return batch + kElement<T> * (plan.slot ? plan.slot[k] : k) + lane;
  };
  for (std::int64_t k = 0; k < length; ++k) {
    const T* const mirror = element(k == 0 ? 0 : length - k);
    aside[2 * k] = mirror[0] * gains.edge_difference[k];
    aside[2 * k + 1] = -mirror[n] * gains.edge_difference[k];
  }
  apply_gains(plan, gains, batch);
  for (std::int64_t k = 0; k < length; ++k) {
    element(k)[0] += aside[2 * k];
    element(k)[n] += aside[2 * k + 1];
  }
}

// A split transform of a block: columns straight from the spectrum, rows there and back, and columns back to
// the spectrum. The batch is read and written twice, not six times.
template <typename T>
void split_column_filter(const Fft<T>& plan, const Spectrum<T>& spectrum, std::int64_t block,
                         const BlockGains<T>& gains, T* batch, T* work, Upcoming next) {
  const std::int64_t width = plan.rows->n, length = plan.columns->n;
  T* const rest = work + length * kElement<T>;
  const BlockElements<T> elements(spectrum, block);
  const std::int64_t together = elements.together(width);
  for (std::int64_t j = 0; together > 0 && j < width; j += together) {
    forward_columns(plan, batch, j, together, elements.column(j, width), elements.step, work);
  }
  for (std::int64_t j = 0; together == 0 && j < width; ++j) {
    elements.load(j, width, length, work);
    forward_columns(plan, batch, j, 1, {work, kElement<T>}, 0, rest);
  }
  const auto gain = [&](std::int64_t bin) {
    return load(gains.gains + (gains.mirrored ? smaller(bin, plan.n - bin) : bin) * kLanes<T>);
  };
  filter_split_rows(plan, batch, work, gain, next);
  for (std::int64_t j = 0; together > 0 && j < width; j += together) {
    inverse_columns(plan, batch, j, together, elements.column(j, width), elements.step, work);
  }
  for (std::int64_t j = 0; together == 0 && j < width; ++j) {
    inverse_columns(plan, batch, j, 1, {work, kElement<T>}, 0, rest);
    elements.store(work, j, width, length);
  }
}

template <typename T>
void column_filter(const Fft<T>& plan, const Spectrum<T>& spectrum, std::int64_t block,
                   const BlockGains<T>& gains, T* scratch, Upcoming next) {
  T *const batch = scratch, *const work = scratch + padded_size(plan) * kElement<T>;
  if (plan.method == Fft<T>::Method::kSplit && gains.edge_difference == nullptr) {
    return split_column_filter(plan, spectrum, block, gains, batch, work, next);
  }
  const BlockElements<T> elements(spectrum, block);
  elements.load(0, 1, plan.n, batch);
  forward(plan, batch, work);
  if (gains.edge_difference != nullptr) {
    apply_edge_gains(plan, gains, spectrum.columns_in(block) - 1, batch);
  } else {
    apply_gains(plan, gains, batch);
  }
  inverse(plan, batch, work);
  elements.store(batch, 0, 1, plan.n);
}

template <typename T>
void scale_block(const Spectrum<T>& spectrum, std::int64_t block, T gain) {
  constexpr int n = kLanes<T>;
  const std::int64_t step = spectrum.step(block), width = spectrum.width_of(block);
  for (std::int64_t group = 0; group < spectrum.groups(); ++group) {
    T* row = spectrum.at(group, block);
    for (std::int64_t i = 0; i < spectrum.signals_in(group); ++i, row += step) {
      for (std::int64_t j = 0; j < width; j += n) {
        const std::int64_t count = width - j < n ? width - j : n;
        store_partial(row + j, gain == 0 ? Vec<T>{} : load_partial(row + j, count) * gain, count);
      }
    }
  }
}

}  // namespace freemerge::FREEMERGE_ISA
