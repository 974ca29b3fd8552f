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

}  // namespace freemerge::cuda
