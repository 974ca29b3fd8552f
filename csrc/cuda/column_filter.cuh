// The column half of the full form, fused: FFT down the columns of half spectra, mask, inverse FFT, one read
// and one write. Columns stay in shared memory in between.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/plan.h"
#include "cuda/column_tables.h"
#include "cuda/half_spectra.h"
#include "cuda/mask_gain.cuh"
#include "cuda/passes.h"

namespace freemerge::cuda {

// Where what the bins of one matrix, or of its coarse grid, add to the squares of what is left of it is put
// down, by Parseval: sums[warp], of the columns of a warp. `center` was taken out of the matrix before its
// coarse grid was formed.
struct Energies {
  double* sums;  // null: nobody wants them
  const float* center;
};

struct ColumnFilter {
  ColumnFilter(const HalfSpectra& spectra, const Mask& mask, double factor, const ColumnTables& tables,
               int parts)
      : spectra(spectra),
        mask(mask),
        factor(factor),
        step_gains{static_cast<float>(factor * mask.gain0), static_cast<float>(factor * mask.gain1),
                   static_cast<float>(factor * mask.gain2)},
        tables(tables),
        parts(parts) {}

  HalfSpectra spectra;
  KernelMask mask;
  double factor;        // of all gains; a transform and its inverse also multiply by the length of a part
  float step_gains[3];  // of a mask of steps, factor included
  ColumnTables tables;
  Energies energies{};
  double energy_share = 0.0;  // of a bin that has no mirror, without a table of energies
  // Parts of the columns are transformed one by one: part p, rows p * height / parts and on, has row
  // frequencies p + parts * k. Whoever made the spectra has combined rows that are height / parts apart
  // (row_spectra.cuh).
  int parts;
};

// How columns, or parts of them, are divided among blocks.
struct ColumnBlocks {
  int length;  // of a part
  LinePasses line;
  int columns_log2;  // of a block
  int threads;
};

ColumnBlocks whole_columns(std::int64_t height, std::int64_t bins);
ColumnBlocks column_blocks(std::int64_t height, const Tiles& tiles);

// Shared memory: of a block with these columns, and what the current device lets a block have.
std::size_t column_bytes(std::int64_t length, int columns);
std::size_t block_bytes();

// What whole columns can be: a few must fit the current device's shared memory, and prime factors are
// bounded.
std::int64_t longest_column();
constexpr int kLargestColumnPrime = 7;

// Multiplies the columns' spectra by factor * M. Neighbouring columns that this would not change are not even
// read.
void column_filter(const ColumnFilter& arguments, const ColumnBlocks& blocks, cudaStream_t stream);

// Of all blocks of a matrix.
std::int64_t column_warps(std::int64_t bins, int parts, const ColumnBlocks& blocks);

// The same multiplication alone, for spectra of whole matrices. Uses no tables.
void column_mask(const ColumnFilter& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
