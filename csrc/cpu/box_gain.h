// What the decimated filter multiplies its coarse spectrum with: the mask less the background over the box of
// frequencies it keeps, with the windows' transforms divided out.
#pragma once

#include <cstdint>
#include <vector>

#include "common/plan.h"
#include "common/window.h"

namespace freemerge {

// A BoxGain as the kernels see it.
struct BoxGainView {
  std::int64_t band, half_bin, pitch;
  const float *row_factor, *column_factor;
  const float* value[3];
  const std::int32_t* bound[2];
  const float* table;  // of row a = 0; null if the mask has steps
};

// Frequencies are (a + half_bin / 2, k) from the centre of the box: a = least() .. band - 1 down, 0 <= k <
// columns.band along. |a| is a, or the mirror image -a - half_bin of a negative one. gain(a, k) =
// (M - background)(a, k) * row_factor[|a|] * column_factor[k].
struct BoxGain {
  std::int64_t band;      // of the rows
  std::int64_t half_bin;  // of the rows, see common/plan.h
  std::int64_t pitch;     // columns.band rounded up to whole vectors; factors beyond the band are zero
  std::vector<float> row_factor;
  std::vector<float> column_factor;

  // Most masks are symmetric in a and change at most twice along it: M - background = value[i] where
  // bound[i - 1] <= |a| < bound[i], one entry per column each.
  std::vector<float> value[3];
  std::vector<std::int32_t> bound[2];
  // Any other mask: rows a = least() .. band - 1 of `pitch` columns; empty if the mask has steps.
  std::vector<float> table;

  std::int64_t least() const { return 1 - band - half_bin; }
  BoxGainView view() const {
    return {band,
            half_bin,
            pitch,
            row_factor.data(),
            column_factor.data(),
            {value[0].data(), value[1].data(), value[2].data()},
            {bound[0].data(), bound[1].data()},
            table.empty() ? nullptr : table.data() - least() * pitch};
  }
  std::int64_t nbytes() const {
    return vector_bytes(row_factor, column_factor, value[0], value[1], value[2], bound[0], bound[1], table);
  }
};

BoxGain make_box_gain(const Plan& plan, const Window& rows, const Window& columns);

}  // namespace freemerge
