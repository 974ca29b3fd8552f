#include <algorithm>
#include <limits>

#include "cuda/heuristics.h"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"
#include "cuda/select.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kSelectEntries;
using heuristics::kSelectThreads;
using Count = unsigned long long;

// The magnitude of a float orders like its bits without the sign: 31 bits, looked at in three digits.
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kDigits = 3;

// 11 + 11 + 9 bits; the last digit overlaps the one before, whose bits all candidates share.
__device__ int shift_of(int digit) { return digit == 0 ? 20 : digit == 1 ? 9 : 0; }

__device__ unsigned key_of(float value) {
#if defined(FREEMERGE_EMULATION)
  return float_bits(value) & 0x7fffffffu;
#else
  return __float_as_uint(value) & 0x7fffffffu;
#endif
}

// What is known of a row's k-th largest key: its leading digits, and how many entries to take among those
// that share them. After the last digit, `prefix` is that key itself; none are taken if it is zero.
struct Threshold {
  unsigned prefix;
  unsigned known;  // bits of the key that `prefix` fixes
  Count take;
};

// Rows are cut into chunks of kSelectEntries, one block each.
struct Job {
  Selection selection;
  std::int64_t first_row;  // ranked together: `rows` rows from here on
  std::int64_t rows;
  std::int64_t chunks;    // of a row
  Threshold* thresholds;  // one a row
  Count* histograms;      // rows x kBins
  Count* above;           // rows x chunks: entries over the threshold, later those before each chunk
  Count* equal;           // rows x chunks: entries at the threshold, later those before each chunk
  int digit;
};

struct Chunk {
  std::int64_t row;
  std::int64_t begin;
  std::int64_t end;
};

__device__ Chunk chunk_of_block(const Job& job) {
  const auto block = static_cast<std::int64_t>(blockIdx.x);
  const std::int64_t begin = block % job.chunks * kSelectEntries;
  const std::int64_t columns = job.selection.columns;
  return {block / job.chunks, begin, begin + kSelectEntries < columns ? begin + kSelectEntries : columns};
}

__device__ float value_at(const Job& job, const Chunk& chunk, std::int64_t column) {
  const std::int64_t i = (job.first_row + chunk.row) * job.selection.columns + column;
  return __fsub_rn(load_wide(job.selection.model, i), load_wide(job.selection.base, i));
}

__global__ void __launch_bounds__(kSelectThreads) start_kernel(Job job) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i < job.rows) job.thresholds[i] = {0u, 0u, static_cast<Count>(job.selection.k)};
  if (i < job.rows * kBins) job.histograms[i] = 0;
}

// Counts the next digit of the keys that agree with what is known.
__global__ void __launch_bounds__(kSelectThreads) histogram_kernel(Job job) {
  unsigned* bins = shared_memory<unsigned>();
  const Chunk chunk = chunk_of_block(job);
  const Threshold threshold = job.thresholds[chunk.row];
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kSelectThreads) bins[b] = 0;
  __syncthreads();
  for (std::int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kSelectThreads) {
    const unsigned key = key_of(value_at(job, chunk, i));
    if ((key & threshold.known) == threshold.prefix)
      atomicAdd(&bins[key >> shift_of(job.digit) & (kBins - 1)], 1u);
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kSelectThreads) {
    if (bins[b] > 0) atomicAdd(&job.histograms[chunk.row * kBins + b], static_cast<Count>(bins[b]));
  }
}

// One block a row: finds the digit of the k-th largest key, from the highest bin down.
__global__ void __launch_bounds__(kSelectThreads) pick_kernel(Job job) {
  Count* scratch = shared_memory<Count>();
  Count* histogram = job.histograms + static_cast<std::int64_t>(blockIdx.x) * kBins;
  Threshold& threshold = job.thresholds[blockIdx.x];
  const Count take = threshold.take;
  constexpr int kEach = kBins / kSelectThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;  // this thread's bins: top, top - 1, ...
  Count mine = 0;
  for (int b = 0; b < kEach; ++b) mine += histogram[top - b];
  Count total = 0;
  Count before = block_prefix_sum(mine, scratch, &total);
  __syncthreads();  // all threads have read `take`
  if (before < take && take <= before + mine) {
    int bin = top;
    for (; before + histogram[bin] < take; --bin) before += histogram[bin];
    const int shift = shift_of(job.digit);
    threshold.prefix |= static_cast<unsigned>(bin) << shift;
    threshold.known |= static_cast<unsigned>(kBins - 1) << shift & 0x7fffffffu;
    const bool zero = job.digit == kDigits - 1 && threshold.prefix == 0;
    threshold.take = zero ? 0 : take - before;
  }
  __syncthreads();
  for (int b = 0; b < kEach; ++b) histogram[top - b] = 0;
}

__global__ void __launch_bounds__(kSelectThreads) count_kernel(Job job) {
  Count* scratch = shared_memory<Count>();
  const Chunk chunk = chunk_of_block(job);
  const unsigned key = job.thresholds[chunk.row].prefix;
  Count above = 0;
  Count equal = 0;
  for (std::int64_t i = chunk.begin + threadIdx.x; i < chunk.end; i += kSelectThreads) {
    const unsigned other = key_of(value_at(job, chunk, i));
    above += other > key;
    equal += other == key;
  }
  above = block_sum(above, scratch);
  __syncthreads();
  equal = block_sum(equal, scratch);
  if (threadIdx.x != 0) return;
  job.above[blockIdx.x] = above;
  job.equal[blockIdx.x] = equal;
}

// One block a row: counts of a chunk become counts before it.
__global__ void __launch_bounds__(kSelectThreads) scan_kernel(Job job) {
  Count* scratch = shared_memory<Count>();
  const std::int64_t row = blockIdx.x;
  const Threshold threshold = job.thresholds[row];
  for (const bool over : {true, false}) {
    Count* counts = (over ? job.above : job.equal) + row * job.chunks;
    Count before = 0;
    for (std::int64_t begin = 0; begin < job.chunks; begin += kSelectThreads) {
      const std::int64_t i = begin + threadIdx.x;
      Count total = 0;
      const Count prefix = block_prefix_sum(i < job.chunks ? counts[i] : Count{0}, scratch, &total);
      if (i < job.chunks) counts[i] = before + prefix;
      before += total;
      __syncthreads();
    }
    if (over && threadIdx.x == 0)
      store(job.selection.counts + job.first_row + row, static_cast<std::int64_t>(before + threshold.take));
  }
}

// Entries over the threshold are kept, and the first `take` at it; the number kept before an entry
// is its position.
__global__ void __launch_bounds__(kSelectThreads) write_kernel(Job job) {
  Count* scratch = shared_memory<Count>();
  const Chunk chunk = chunk_of_block(job);
  const Threshold threshold = job.thresholds[chunk.row];
  const std::int64_t row = job.first_row + chunk.row;
  Count above_before = job.above[blockIdx.x];
  Count equal_before = job.equal[blockIdx.x];
  std::int64_t* indices = job.selection.indices + row * job.selection.k;
  float* values = job.selection.values + row * job.selection.k;
  for (std::int64_t begin = chunk.begin; begin < chunk.end; begin += kSelectThreads) {
    const std::int64_t i = begin + threadIdx.x;
    const float value = i < chunk.end ? value_at(job, chunk, i) : 0.0f;
    const unsigned key = key_of(value);
    const bool above = i < chunk.end && key > threshold.prefix;
    const bool equal = i < chunk.end && key == threshold.prefix;
    Count above_total = 0;
    Count equal_total = 0;
    const Count a = above_before + block_prefix_sum(Count{above}, scratch, &above_total);
    __syncthreads();
    const Count e = equal_before + block_prefix_sum(Count{equal}, scratch, &equal_total);
    __syncthreads();
    if (above || (equal && e < threshold.take)) {
      const Count position = a + (e < threshold.take ? e : threshold.take);
      store(indices + position, row * job.selection.columns + i);
      store(values + position, value);
    }
    above_before += above_total;
    equal_before += equal_total;
  }
}

constexpr std::size_t kAlignment = 256;

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

unsigned grid_size(std::int64_t blocks) {
  require(blocks <= std::numeric_limits<int>::max(), "rows x columns is too large");
  return static_cast<unsigned>(blocks);
}

void select_rows(Job job, cudaStream_t stream) {
  const std::int64_t rows = job.rows;
  const dim3 threads(kSelectThreads);
  const dim3 per_row(grid_size(rows));
  const dim3 per_chunk(grid_size(rows * job.chunks));
  const std::size_t sums = kSelectThreads / kWarpSize * sizeof(Count);
  const dim3 clearing(grid_size(ceil_div(rows * kBins, kSelectThreads)));
  launch(start_kernel, Launch("select_start", clearing, threads, 0, stream), job);
  for (job.digit = 0; job.digit < kDigits; ++job.digit) {
    launch(histogram_kernel, Launch("select_histogram", per_chunk, threads, kBins * sizeof(unsigned), stream),
           job);
    launch(pick_kernel, Launch("select_pick", per_row, threads, sums, stream), job);
  }
  launch(count_kernel, Launch("select_count", per_chunk, threads, sums, stream), job);
  launch(scan_kernel, Launch("select_scan", per_row, threads, sums, stream), job);
  launch(write_kernel, Launch("select_write", per_chunk, threads, sums, stream), job);
}

}  // namespace

std::size_t select_scratch(std::int64_t rows, std::int64_t columns) {
  const auto r = static_cast<std::size_t>(std::min(rows, heuristics::kSelectRows));
  const auto chunks = static_cast<std::size_t>(ceil_div(columns, kSelectEntries));
  return aligned(r * sizeof(Threshold)) + aligned(r * kBins * sizeof(Count)) +
         2 * aligned(r * chunks * sizeof(Count));
}

void select(const Selection& selection, void* scratch, cudaStream_t stream) {
  require(selection.rows > 0 && selection.columns > 0, "rows and columns must be positive");
  require(selection.k > 0 && selection.k <= selection.columns,
          "k must be between 1 and the number of columns");
  require_storage(selection.model);
  require_storage(selection.base);
  Job job{};
  job.chunks = ceil_div(selection.columns, kSelectEntries);
  const auto rows = static_cast<std::size_t>(std::min(selection.rows, heuristics::kSelectRows));
  char* free = static_cast<char*>(scratch);
  job.thresholds = reinterpret_cast<Threshold*>(free);
  free += aligned(rows * sizeof(Threshold));
  job.histograms = reinterpret_cast<Count*>(free);
  free += aligned(rows * kBins * sizeof(Count));
  job.above = reinterpret_cast<Count*>(free);
  free += aligned(rows * static_cast<std::size_t>(job.chunks) * sizeof(Count));
  job.equal = reinterpret_cast<Count*>(free);
  job.selection = selection;
  for (job.first_row = 0; job.first_row < selection.rows; job.first_row += heuristics::kSelectRows) {
    job.rows = std::min(heuristics::kSelectRows, selection.rows - job.first_row);
    select_rows(job, stream);
  }
}

}  // namespace freemerge::cuda
