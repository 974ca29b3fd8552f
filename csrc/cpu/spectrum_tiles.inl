// Whole blocks of kLanes columns of a spectrum, between 2 * kLanes signals and their transform in lanes;
// compiled once per instruction set. The batch holds Z = A + i B of two groups of signals; see full.inl.
#pragma once

#include "cpu/fft.inl"

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

// low(j) and high(j) are the slots of bins k and n - k of column j; signals lie `step` reals apart, those of
// B after those of A.
template <typename T, typename Low, typename High>
FM_INLINE void store_full_block(const T* batch, Low low, High high, T* to, std::int64_t step) {
  constexpr int n = kLanes<T>;
  const auto z = [&](int j) { return batch + low(j) * kElement<T>; };
  const auto mirror = [&](int j) { return batch + high(j) * kElement<T>; };
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

template <typename T, typename Low, typename High>
FM_INLINE void load_full_block(T* batch, Low low, High high, const T* from, std::int64_t step) {
  constexpr int n = kLanes<T>;
  const auto z = [&](int j) { return batch + low(j) * kElement<T>; };
  const auto mirror = [&](int j) { return batch + high(j) * kElement<T>; };
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

}  // namespace freemerge::FREEMERGE_ISA
