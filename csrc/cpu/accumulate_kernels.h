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
};

// Entries [begin, begin + count). sums[i] = sum over them of |v_i|.
using AccumulateKernel = void (*)(const AccumulateJob& job, std::int64_t begin, std::int64_t count,
                                  double* sums);
// Sum of squares of entries [begin, begin + count).
using SquareSumKernel = double (*)(Storage x, std::int64_t begin, std::int64_t count);
using AddRoundKernel = void (*)(const AddRoundJob& job, std::int64_t begin, std::int64_t count);

#define FREEMERGE_DECLARE_ACCUMULATE(isa)                                                                \
  namespace isa {                                                                                        \
  void accumulate_range(const AccumulateJob& job, std::int64_t begin, std::int64_t count, double* sums); \
  void add_round_range(const AddRoundJob& job, std::int64_t begin, std::int64_t count);                  \
  double square_sum_range(Storage x, std::int64_t begin, std::int64_t count);                            \
  }
FREEMERGE_DECLARE_ACCUMULATE(baseline)
#if defined(__x86_64__)
FREEMERGE_DECLARE_ACCUMULATE(avx2)
FREEMERGE_DECLARE_ACCUMULATE(avx512)
#endif
#undef FREEMERGE_DECLARE_ACCUMULATE

}  // namespace freemerge
