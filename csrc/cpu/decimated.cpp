#include "cpu/decimated.h"

#include <algorithm>

#include "common/error.h"
#include "cpu/buffer.h"
#include "cpu/parallel.h"

namespace freemerge {

namespace {

// Everything of a job that its matrices share.
class DecimatedFilter {
 public:
  DecimatedFilter(const Plan& plan, DType dtype, std::int64_t stride, double scale,
                  const DecimatedKernels& kernels)
      : kernels_(kernels),
        rows_(window_for(plan.mask.height, plan.rows)),
        columns_(window_for(plan.mask.width, plan.columns)),
        gain_(box_gain_for(plan, *rows_, *columns_)),
        row_fft_(shared_fft<float>(plan.columns.cells)),
        column_fft_(shared_fft<float>(plan.rows.cells)),
        job_{nullptr,
             dtype,
             plan.mask.height,
             plan.mask.width,
             stride,
             static_cast<float>(scale * plan.background),
             rows_->taper(),
             columns_->taper(),
             plan.rows,
             plan.columns,
             row_fft_.get(),
             column_fft_.get(),
             BoxGainView(*gain_),
             static_cast<float>(scale),
             nullptr} {}

  // Work areas of one worker, and the coarse spectrum of one matrix.
  Buffer<float> scratch() const { return Buffer<float>(kernels_.scratch_floats(job_)); }
  Buffer<float> spectrum() const { return Buffer<float>(blocks() * kernels_.lanes * job_.rows.cells * 2); }

  // Blocks of the longest loop over one matrix.
  std::int64_t parallel_blocks() const { return std::max(bands(), blocks()); }

  // Filters one matrix with the first `workers` elements of `scratch`.
  void run(void* matrix, float* spectrum, const Buffer<float>* scratch, int workers) const {
    DecimatedJob job = job_;
    job.data = matrix;
    job.spectrum = spectrum;
    const auto stage = [&](std::int64_t items, auto kernel) {
      // One run of items per worker: each run starts with a few rows that its predecessor has too.
      const std::int64_t parts = workers_for(items, workers);
      parallel_for(parts, static_cast<int>(parts), [&](std::int64_t part, int worker) {
        kernel(job, items * part / parts, items * (part + 1) / parts, scratch[worker].data());
      });
    };
    stage(bands(), kernels_.gather);
    stage(blocks(), kernels_.respond);
    stage(bands(), kernels_.interpolate);
  }

 private:
  std::int64_t bands() const { return job_.rows.cells / (2 * kernels_.lanes); }
  std::int64_t blocks() const { return (job_.columns.band + kernels_.lanes - 1) / kernels_.lanes; }

  const DecimatedKernels& kernels_;
  const std::shared_ptr<const Window> rows_, columns_;
  const std::shared_ptr<const BoxGain> gain_;
  const std::shared_ptr<const Fft<float>> row_fft_, column_fft_;
  const DecimatedJob job_;
};

void check(const Plan& plan, const Matrices& matrices, int threads) {
  require(matrices.dtype != DType::kFloat64, "the decimated form has no float64 arithmetic");
  require(matrices.row_stride >= plan.mask.width, "row_stride must be at least the width");
  require(threads >= 1, "threads must be at least 1");
  const auto windowed = [](const Decimation& axis) { return axis.taps >= kMinTaps && axis.taps <= kMaxTaps; };
  require(windowed(plan.rows) && (windowed(plan.columns) || is_whole(plan.columns)),
          "decimation: taps must be between 6 and 9, or 0 along the width");
  require(plan.rows.cells % kRowCellsMultiple == 0,
          "decimation: cells along the height must be a multiple of 32");
}

}  // namespace

void filter_decimated(const Plan& plan, const Matrices& matrices, double scale, int threads,
                      const Kernels& kernels) {
  check(plan, matrices, threads);
  const DecimatedFilter filter(plan, matrices.dtype, matrices.row_stride, scale, kernels.decimated);
  const auto count = static_cast<std::int64_t>(matrices.data.size());
  // Whole matrices per worker where there are enough of them: no waiting, and each stays in one core's cache.
  const bool whole = count >= threads;
  const int workers = workers_for(whole ? count : filter.parallel_blocks(), threads);
  std::vector<Buffer<float>> scratch, spectra;
  for (int worker = 0; worker < workers; ++worker) {
    scratch.push_back(filter.scratch());
    if (whole || worker == 0) spectra.push_back(filter.spectrum());
  }
  if (whole) {
    parallel_for(count, workers, [&](std::int64_t i, int worker) {
      const auto index = static_cast<std::size_t>(worker);
      filter.run(matrices.data[static_cast<std::size_t>(i)], spectra[index].data(), &scratch[index], 1);
    });
  } else {
    for (void* const matrix : matrices.data) filter.run(matrix, spectra[0].data(), scratch.data(), workers);
  }
}

}  // namespace freemerge
