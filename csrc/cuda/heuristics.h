// The tuning numbers of the CUDA backend (shapes of tiles are beside their kernels), for an H100 SXM (132
// multiprocessors, 50 MB of L2, 3.35 TB/s): from the traffic model, corrected after profiles of the filter on
// one. None has been swept on its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freemerge::cuda::heuristics {

// Matrices of one shape that go through one launch; their addresses travel as kernel arguments (1 KiB of 4
// KiB).
constexpr int kMatricesPerLaunch = 64;

// A panel is written by one kernel and read by the next, well within the 50 MB of L2.
constexpr std::size_t kPanelBytes = std::size_t{32} << 20;
constexpr std::size_t kWorkBytes = std::size_t{16} << 20;

// Coarse grids or spectra of small matrices are batched up to this size: they and their matrices stay in L2.
constexpr std::size_t kBatchBytes = std::size_t{16} << 20;

// Complex numbers of the 32 bytes that memory moves at once.
constexpr std::int64_t kBinsPerSector = 4;

// Windowed passes down the rows: threads of a block, each taking four columns; rows on their way from memory
// at a time, of a matrix alone and of a matrix and a base. The pass that also forms a sum: its blocks that
// fit a multiprocessor; rows that it adds up before it spreads them. Of a matrix all blocks run at once:
// chunks of rows are whole tiles of the sum, as many as fill 132 multiprocessors with its blocks.
constexpr int kRowPassThreads = 64;
constexpr int kAhead = 7;
constexpr int kAheadWithBase = 4;
constexpr int kSumPassBlocks = 5;
constexpr int kTileRows = 8;
constexpr std::int64_t kBlocksWanted = 132 * kSumPassBlocks;
constexpr std::int64_t kMinChunkRows = 32;

// Threads of a block of the fused sum, each of which takes eight neighbouring entries. It also fixes the
// order in which |v| is summed: changing it changes the last bits of E|v|.
constexpr int kSumThreads = 256;

// Selection: threads of a block, entries that it ranks.
constexpr int kSelectThreads = 256;
constexpr std::int64_t kSelectEntries = 16384;
constexpr std::int64_t kSelectRows = 1024;  // rows ranked at a time (16 KiB of scratch each)

// Switching of experts: tensors that share a launch (their jobs take 3.8 of the 4 KiB of kernel arguments),
// threads of a block, entries of a thread.
constexpr int kUpdatesPerLaunch = 60;
constexpr int kSparseThreads = 256;
constexpr int kSparseEntries = 4;

// cuFFT plans kept for each thread, of all devices together: a shape takes two to four.
constexpr std::size_t kPlansCached = 256;

}  // namespace freemerge::cuda::heuristics
