// What task vectors v_i = theta_i - theta_0 are made of, as a kernel argument.
#pragma once

#include "cuda/array.h"

namespace freemerge::cuda {

constexpr int kModelsPerLaunch = 16;

struct TaskVectors {
  Array base;
  Array models[kModelsPerLaunch];
  float weights[kModelsPerLaunch];
  int count;
};

// What one float matrix, whose rows lie end to end, is to be first: the weighted sum of task vectors.
struct SumFirst {
  TaskVectors vectors;
  // On the device: mean |v_i| of each model, then the squares of the sum, added up, and, by Parseval, those
  // of what the filter leaves: in the decimated form without background^2 times the former.
  double* results;
};

// What the last pass of a filter makes of such a sum instead of writing it back: out = base + scale * (factor
// * sum), rounded as add_round() does. Rows lie end to end; `out` may be `base` itself.
struct AddLast {
  Array out;  // no data: the sum is written back
  Array base;
  float scale;
  float factor;
};

}  // namespace freemerge::cuda
