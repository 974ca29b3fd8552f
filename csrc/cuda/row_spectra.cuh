// The row passes of the full form in three kernels. Every block takes some rows of one matrix, `parts` of
// them that are height / parts apart; it transforms them two by two as one complex line in shared memory, and
// combines the rows of its group, bin by bin, by a transform of `parts` points and turns. That leaves the
// columns in `parts` pieces, each a transform of its own: piece p holds row frequencies p + parts * k.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/plan.h"
#include "cuda/chirp.h"
#include "cuda/half_spectra.h"
#include "cuda/matrices.h"
#include "cuda/passes.h"
#include "cuda/task_vectors.h"
#include "cuda/upload.h"

namespace freemerge::cuda {

struct RowTables {
  LinePasses line;
  const std::uint16_t* offsets;  // see frequency_offsets()
  const float2* roots;           // of the passes' length
  const float2* turns;           // roots of the height; null for one part
  Chirp chirp;                   // of the width; empty where the passes transform it
  // For each bin, what its square adds to those of what the filter leaves if its column's gain is constant,
  // else 0.
  const float* kept;
};

// `kept`: see RowTables.
RowTables row_tables(std::int64_t height, std::int64_t width, const Tiles& tiles,
                     const std::vector<float>& kept, const Upload& upload);

struct RowPass {
  Matrices matrices;
  HalfSpectra spectra;  // which may lie in the matrices' own memory
  RowTables tables;
  int parts;
  int threads;
  float factor;  // of the rows that come back
  // Where there are models: one float matrix, whose rows lie end to end, is their weighted sum first.
  TaskVectors vectors;
  double* sums;  // sums[i][warp]: of |v_i| for each model, then of squares, and of those that are kept
  AddLast add;   // of that matrix, which then stays as it is
};

// Of all blocks of a matrix.
std::int64_t row_warps(std::int64_t height, const Tiles& tiles);

// Shared memory of a block whose lines have this many points.
std::size_t row_bytes(std::int64_t points, int parts);

// spectra = twice the half spectra of the matrices' rows, combined; a weighted sum itself is written nowhere
void rows_to_spectra(const RowPass& arguments, cudaStream_t stream);

// rows of the matrices = factor * their unnormalised inverse transforms, rounded to the storage dtype, or
// added to a base, elsewhere
void spectra_to_rows(const RowPass& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
