// Task vectors v_i = theta_i - theta_0 on the device: the same formulas and roundings as cpu/accumulate.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/array.h"
#include "cuda/task_vectors.h"

namespace freemerge::cuda {

// Doubles that accumulate() needs as scratch.
std::int64_t accumulate_scratch(std::int64_t n, std::int64_t models);

// out[j] = sum_i weights[i] * v_i[j] (float; null for the means alone), and means[i] = mean_j |v_i[j]|.
// Products are rounded before they are added, model after model. The means are double sums in an order that
// only n fixes. `out` must not overlap the inputs.
void accumulate(float* out, const Array& base, const std::vector<Array>& models,
                const std::vector<double>& weights, std::int64_t n, double* means, double* scratch,
                cudaStream_t stream);

// averages[i] = (partial[i][0] + ... + partial[i][blocks - 1]) / n for 0 <= i < rows, in a fixed order.
void average(const double* partial, int rows, std::int64_t blocks, std::int64_t n, double* averages,
             cudaStream_t stream);

// Numbers that a kernel put down in parts, which are to be added up.
struct Parts {
  const double* data;
  std::int64_t count;
};

// The results of a sum from what the passes of a filter before the last put down: sums.data[i][part] of
// |v_i|, then of squares of the n entries before the filter; and what its mask found.
void finish_sum(const SumFirst& sum, const Parts& sums, std::int64_t n, const Parts& energies,
                cudaStream_t stream);

// out[j] = base[j] + scale * (factor * delta[j]), products and sum rounded to float, then to out's dtype.
// `out` may be `base` or `delta` itself.
void add_round(const Array& out, const Array& base, const Array& delta, double scale, double factor,
               std::int64_t n, cudaStream_t stream);

}  // namespace freemerge::cuda
