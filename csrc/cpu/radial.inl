// Gains of smooth radial masks, compiled once per instruction set. See radial_table.h.
#pragma once

#include "cpu/radial_table.h"
#include "cpu/simd.h"

namespace freemerge::FREEMERGE_ISA {

// The cell of a squared radius; the first one also stands for radii below it.
FM_INLINE std::int32_t radial_cell(const RadialCells& cells, float squared) {
  const auto cell = static_cast<std::int32_t>(bit_cast<std::uint32_t>(squared) >> cells.shift) - cells.first;
  return cell < 0 ? 0 : cell;
}

// out[row * lanes + j] = factor * gain(row_squared[row] + column_squared[j]) - offset, for `lanes` columns.
inline void radial_gains(const RadialCells& cells, const float* column_squared, const float* row_squared,
                         std::int64_t rows, float factor, float offset, float* out) {
  constexpr int n = kLanes<float>;
  typedef std::int32_t Cells __attribute__((vector_size(FREEMERGE_VECTOR_BYTES)));
  const FloatVec columns = load(column_squared);
  float least = column_squared[0], most = least;
  for (int j = 1; j < n; ++j) {
    least = column_squared[j] < least ? column_squared[j] : least;
    most = column_squared[j] > most ? column_squared[j] : most;
  }
  const float unit = 1.0f / static_cast<float>(1 << cells.shift);
  for (std::int64_t row = 0; row < rows; ++row) {
    const WordVec bits = bit_cast<WordVec>(columns + row_squared[row]);
    Cells cell = bit_cast<Cells>(bits >> cells.shift) - cells.first;
    const Cells rest = bit_cast<Cells>(bits & ((1u << cells.shift) - 1u));
    const FloatVec fraction = __builtin_convertvector(rest, FloatVec) * unit;
    cell &= cell >= 0;
    // Neighbouring columns mostly share a cell or lie in two.
    const std::int32_t first = radial_cell(cells, least + row_squared[row]);
    const std::int32_t last = radial_cell(cells, most + row_squared[row]);
    FloatVec result{};
    for (std::int32_t current = first; current <= last; ++current) {
      const float* const c = cells.coefficients + static_cast<std::int64_t>(current) * RadialCells::kNodes;
      FloatVec gain = broadcast(c[RadialCells::kNodes - 1]);
#pragma GCC unroll 8
      for (int i = RadialCells::kNodes - 2; i >= 0; --i) gain = gain * (fraction - cells.node[i]) + c[i];
      const WordVec here = bit_cast<WordVec>(cell == current);
      result = bit_cast<FloatVec>(select(here, bit_cast<WordVec>(gain), bit_cast<WordVec>(result)));
    }
    store(out + row * n, result * factor - offset);
  }
}

}  // namespace freemerge::FREEMERGE_ISA
