// Row-column transforms of real matrices, compiled once per instruction set. See spectrum.h for the layouts.
#pragma once

#include "cpu/fft.inl"
#include "cpu/spectrum.h"

namespace freemerge::FREEMERGE_ISA {

// Transposes N x N tiles through registers: row(i) gives row i, put(j, v) takes column j.
template <typename T, typename Row, typename Put>
FM_INLINE void transpose_tile(Row row, Put put) {
  Vec<T> tile[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) tile[i] = row(i);
  transpose<T>(tile);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) put(i, tile[i]);
}

// Matrix <-> batch
// ------------------------------------------------------------------------------------------------

template <typename Storage, typename T>
void load_rows(const Storage* x, std::int64_t stride, std::int64_t rows, std::int64_t length, T* batch) {
  constexpr int n = kLanes<T>;
  constexpr std::int64_t kAhead = 4 * n;
  for (std::int64_t e = 0; e < length; e += n) {
    const std::int64_t width = length - e < n ? length - e : n;
    for (int half = 0; half < 2; ++half) {
      const std::int64_t present = rows - half * n;
      const Storage* from = x + half * n * stride + e;
      T* const to = batch + e * kElement<T> + half * n;
      if (present >= n && width == n) {
        transpose_tile<T>(
            [&](int i) {
              prefetch_l2(from + i * stride + kAhead);
              return load(from + i * stride);
            },
            [&](int j, Vec<T> v) { store(to + j * kElement<T>, v); });
      } else {
        transpose_tile<T>(
            [&](int i) { return i < present ? load_partial(from + i * stride, width) : Vec<T>{}; },
            [&](int j, Vec<T> v) {
              if (j < width) store(to + j * kElement<T>, v);
            });
      }
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
void store_rows(const T* batch, Storage* x, std::int64_t stride, std::int64_t rows, std::int64_t length,
                T background, T factor) {
  constexpr int n = kLanes<T>;
  for (std::int64_t e = 0; e < length; e += n) {
    const std::int64_t width = length - e < n ? length - e : n;
    for (int half = 0; half < 2; ++half) {
      const std::int64_t present = rows - half * n;
      const T* const from = batch + e * kElement<T> + half * n;
      Storage* to = x + half * n * stride + e;
      if (present >= n && width == n) {
        transpose_tile<T>([&](int j) { return load(from + j * kElement<T>); },
                          [&](int i, Vec<T> v) {
                            Storage* const place = to + i * stride;
                            store(place, combine(v, place, background, factor));
                          });
      } else {
        transpose_tile<T>([&](int j) { return j < width ? load(from + j * kElement<T>) : Vec<T>{}; },
                          [&](int i, Vec<T> v) {
                            if (i >= present) return;
                            Storage* const place = to + i * stride;
                            store_partial(place, combine_partial(v, place, width, background, factor), width);
                          });
      }
    }
  }
}

// Signals are columns: no transpose, the lanes are contiguous already.
template <typename Storage, typename T>
void load_columns(const Storage* x, std::int64_t stride, std::int64_t columns, std::int64_t length,
                  T* batch) {
  constexpr int n = kLanes<T>;
  for (std::int64_t e = 0; e < length; ++e) {
    const Storage* from = x + e * stride;
    T* const to = batch + e * kElement<T>;
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
void store_columns(const T* batch, Storage* x, std::int64_t stride, std::int64_t columns, std::int64_t length,
                   T background, T factor) {
  constexpr int n = kLanes<T>;
  for (std::int64_t e = 0; e < length; ++e) {
    Storage* to = x + e * stride;
    const T* const from = batch + e * kElement<T>;
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

template <typename T>
void store_full_block(const T* batch, const std::int32_t* low, const std::int32_t* high, T* to,
                      std::int64_t step) {
  constexpr int n = kLanes<T>;
  const auto z = [&](int j) { return batch + low[j] * kElement<T>; };
  const auto mirror = [&](int j) { return batch + high[j] * kElement<T>; };
  transpose_tile<T>([&](int j) { return load(z(j)) + load(mirror(j)); },
                    [&](int i, Vec<T> v) { store(to + i * step, v); });
  transpose_tile<T>([&](int j) { return load(z(j) + n) - load(mirror(j) + n); },
                    [&](int i, Vec<T> v) { store(to + i * step + n, v); });
  to += n * step;
  transpose_tile<T>([&](int j) { return load(z(j) + n) + load(mirror(j) + n); },
                    [&](int i, Vec<T> v) { store(to + i * step, v); });
  transpose_tile<T>([&](int j) { return load(mirror(j)) - load(z(j)); },
                    [&](int i, Vec<T> v) { store(to + i * step + n, v); });
}

template <typename T>
void load_full_block(T* batch, const std::int32_t* low, const std::int32_t* high, const T* from,
                     std::int64_t step) {
  constexpr int n = kLanes<T>;
  const auto z = [&](int j) { return batch + low[j] * kElement<T>; };
  const auto mirror = [&](int j) { return batch + high[j] * kElement<T>; };
  const T* const second = from + n * step;
  Vec<T> kept[n];
  transpose_tile<T>([&](int i) { return load(from + i * step); }, [&](int j, Vec<T> v) { kept[j] = v; });
  transpose_tile<T>([&](int i) { return load(second + i * step + n); },
                    [&](int j, Vec<T> v) {
                      store(z(j), kept[j] - v);
                      store(mirror(j), kept[j] + v);
                    });
  transpose_tile<T>([&](int i) { return load(from + i * step + n); }, [&](int j, Vec<T> v) { kept[j] = v; });
  transpose_tile<T>([&](int i) { return load(second + i * step); },
                    [&](int j, Vec<T> v) {
                      store(z(j) + n, v + kept[j]);
                      store(mirror(j) + n, v - kept[j]);
                    });
}

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

template <typename Storage, typename T>
void analyse(const Fft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
             std::int64_t group, T* scratch) {
  constexpr int n = kLanes<T>;
  T *const batch = scratch, *const work = scratch + plan.n * kElement<T>;
  const std::int64_t first = group * spectrum.group_size(), count = spectrum.signals_in(group);
  if (signals.transposed) {
    load_columns(signals.data + first, signals.row_stride, count, signals.length, batch);
  } else {
    load_rows(signals.data + first * signals.row_stride, signals.row_stride, count, signals.length, batch);
  }
  forward(plan, batch, work);
  for (std::int64_t block = 0; block < spectrum.blocks(); ++block) {
    if (is_full_block(spectrum, group, block)) {
      store_full_block(batch, spectrum.low + block * n, spectrum.high + block * n, spectrum.at(group, block),
                       spectrum.step(block));
    } else {
      store_ragged_block(batch, spectrum, group, block);
    }
  }
}

template <typename Storage, typename T>
void synthesise(const Fft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                std::int64_t group, T background, T factor, T* scratch) {
  constexpr int n = kLanes<T>;
  T *const batch = scratch, *const work = scratch + plan.n * kElement<T>;
  const std::int64_t first = group * spectrum.group_size(), count = spectrum.signals_in(group);
  if (!spectrum.complete) {
    __builtin_memset(batch, 0, static_cast<std::size_t>(plan.n * kElement<T>) * sizeof(T));
  }
  for (std::int64_t block = 0; block < spectrum.blocks(); ++block) {
    if (is_full_block(spectrum, group, block)) {
      load_full_block(batch, spectrum.low + block * n, spectrum.high + block * n, spectrum.at(group, block),
                      spectrum.step(block));
    } else {
      load_ragged_block(batch, spectrum, group, block);
    }
  }
  inverse(plan, batch, work);
  if (signals.transposed) {
    store_columns(batch, signals.data + first, signals.row_stride, count, signals.length, background, factor);
  } else {
    store_rows(batch, signals.data + first * signals.row_stride, signals.row_stride, count, signals.length,
               background, factor);
  }
}

template <typename T>
void load_block(const Spectrum<T>& spectrum, std::int64_t block, T* batch) {
  constexpr int n = kLanes<T>;
  const std::int64_t step = spectrum.step(block), columns = spectrum.columns_in(block);
  const std::int64_t imaginary = spectrum.width_of(block) - columns;
  for (std::int64_t group = 0; group < spectrum.groups(); ++group) {
    const T* from = spectrum.at(group, block);
    const T* next = spectrum.at(group + 1 < spectrum.groups() ? group + 1 : group, block);
    const std::int64_t count = spectrum.signals_in(group);
    if (imaginary == n) {
      for (std::int64_t i = 0; i < count; ++i, batch += kElement<T>) {
        store(batch, load(from + i * step));
        store(batch + n, load(from + i * step + n));
        prefetch(next + i * step);
        prefetch(next + i * step + n);
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i, batch += kElement<T>) {
        store(batch, load_partial(from + i * step, columns));
        store(batch + n, load_partial(from + i * step + columns, imaginary));
      }
    }
  }
}

template <typename T>
void store_block(const Spectrum<T>& spectrum, std::int64_t block, const T* batch) {
  constexpr int n = kLanes<T>;
  const std::int64_t step = spectrum.step(block), columns = spectrum.columns_in(block);
  const std::int64_t imaginary = spectrum.width_of(block) - columns;
  for (std::int64_t group = 0; group < spectrum.groups(); ++group) {
    T* to = spectrum.at(group, block);
    const std::int64_t count = spectrum.signals_in(group);
    if (imaginary == n) {
      for (std::int64_t i = 0; i < count; ++i, batch += kElement<T>) {
        store(to + i * step, load(batch));
        store(to + i * step + n, load(batch + n));
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i, batch += kElement<T>) {
        store_partial(to + i * step, load(batch), columns);
        store_partial(to + i * step + columns, load(batch + n), imaginary);
      }
    }
  }
}

template <typename T>
FM_INLINE void multiply(T* element, Vec<T> gain) {
  store(element, load(element) * gain);
  store(element + kLanes<T>, load(element + kLanes<T>) * gain);
}

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

template <typename T>
void filter_block(const Fft<T>& plan, const Spectrum<T>& spectrum, std::int64_t block,
                  const BlockGains<T>& gains, T* scratch) {
  T *const batch = scratch, *const work = scratch + plan.n * kElement<T>;
  load_block(spectrum, block, batch);
  forward(plan, batch, work);
  if (gains.edge_difference != nullptr) {
    apply_edge_gains(plan, gains, spectrum.columns_in(block) - 1, batch);
  } else {
    apply_gains(plan, gains, batch);
  }
  inverse(plan, batch, work);
  store_block(spectrum, block, batch);
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
