// The inner loops of accumulate.cpp, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/accumulate.h"

namespace freemerge {

struct AccumulateJob {
  void* out;  // float or double as `compute` says, or null
  DType compute;
  Storage base;
  const Storage* models;
  const double* weights;
  int model_count;
};

struct AddRoundJob {
  void* out;
  DType out_dtype;
  DType compute;
  Storage base;
  Storage delta;
  double scale;
  double factor;
};

// Entries [begin, begin + count). sums[i] = sum over them of |v_i|; *squares, unless null, that of out^2.
using AccumulateRange = void(const AccumulateJob& job, std::int64_t begin, std::int64_t count, double* sums,
                             double* squares);
// Returns whether all that was written is finite.
using AddRoundRange = bool(const AddRoundJob& job, std::int64_t begin, std::int64_t count);
struct ElectJob {
  Election election;
  Storage delta;
  double weight;
  Magnitudes range;
};

using ElectRange = void(const ElectJob& job, std::int64_t begin, std::int64_t count);
using DecideRange = void(const Election& election, DType dtype, std::int64_t begin, std::int64_t count);
// Sum of squares of entries [begin, begin + count).
using SquareSumRange = double(Storage x, std::int64_t begin, std::int64_t count);

}  // namespace freemerge
