#include "cuda/window_tables.h"

#include <algorithm>
#include <vector>

#include "common/error.h"
#include "common/window.h"

namespace freemerge::cuda {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// What both axes need: samples and their cells.
WindowTables by_sample(std::int64_t samples, const Decimation& axis, const Window& window,
                       const Upload& upload) {
  WindowTables tables{};
  static_cast<Decimation&>(tables) = axis;
  tables.samples = samples;
  if (tables.whole()) return tables;
  require(axis.taps <= kMaxTaps, "windows have at most 12 taps");
  const int padded = padded_taps(axis.taps);
  std::vector<std::int32_t> cell(index(samples));
  std::vector<float> weights(index(samples * padded), 0.0f);
  for (std::int64_t c = 0; c < axis.cells; ++c) {
    for (std::int64_t n = window.first[index(c)]; n < window.first[index(c + 1)]; ++n) {
      cell[index(n)] = static_cast<std::int32_t>(c);
      std::copy_n(&window.weights[index(n * axis.taps)], axis.taps, &weights[index(n * padded)]);
    }
  }
  tables.first = to_device(window.first, upload);
  tables.cell = to_device(cell, upload);
  tables.weights = to_device(weights, upload);
  tables.transform = to_device(window.transform, upload);
  return tables;
}

}  // namespace

WindowTables row_window(std::int64_t samples, const Decimation& axis, const Upload& upload) {
  return by_sample(samples, axis, make_window(samples, axis), upload);
}

WindowTables column_window(std::int64_t samples, const Decimation& axis, const Upload& upload) {
  const Window window = make_window(samples, axis);
  WindowTables tables = by_sample(samples, axis, window, upload);
  if (tables.whole()) return tables;
  const std::int64_t cells = axis.cells;
  const auto first = [&](std::int64_t c) {  // cells below 0 are the last ones, one period earlier
    return c < 0 ? window.first[index(c + cells)] - samples : window.first[index(c)];
  };
  std::vector<std::int32_t> start;
  for (std::int64_t c = 0; c < cells; ++c) {
    start.push_back(static_cast<std::int32_t>(first(c - axis.taps + 1)));
    tables.reach = std::max(tables.reach, first(c + 1) - start.back());
  }
  std::vector<float> spread(index(tables.reach * cells), 0.0f);
  for (std::int64_t c = 0; c < cells; ++c) {
    for (int j = 0; j < axis.taps; ++j) {  // the samples that reach cell c as their j-th: those of cell c - j
      for (std::int64_t n = first(c - j); n < first(c - j + 1); ++n) {
        const std::int64_t sample = n < 0 ? n + samples : n;
        spread[index((n - start[index(c)]) * cells + c)] = window.weights[index(sample * axis.taps + j)];
      }
    }
  }
  tables.start = to_device(start, upload);
  tables.spread = to_device(spread, upload);
  return tables;
}

}  // namespace freemerge::cuda
