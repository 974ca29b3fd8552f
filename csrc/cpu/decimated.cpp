#include "cpu/decimated.h"

#include <algorithm>

#include "cpu/decimated_filter.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "error.h"

namespace freemerge {

namespace {

// Everything of a job that its matrices share.
class DecimatedFilter {
 public:
  DecimatedFilter(const Plan& plan, DType dtype, std::int64_t stride, double scale, const DecimatedKernels& kernels)
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
             0.0f,
             static_cast<float>(scale * plan.background),
             0.0f,
             rows_->taper(),
             columns_->taper(),
             plan.rows,
             plan.columns,
             row_fft_.get(),
             column_fft_.get(),
             BoxGainView(*gain_),
             static_cast<float>(scale),
             nullptr} {}

  void run(void* data, int threads) const {
    const std::int64_t bands = job_.rows.cells / (2 * kernels_.lanes);
    const std::int64_t blocks = (job_.columns.band + kernels_.lanes - 1) / kernels_.lanes;
    const auto spectrum_floats = static_cast<std::size_t>(blocks * kernels_.lanes * job_.rows.cells * 2);
    const Workspace spectrum(spectrum_floats * sizeof(float));
    DecimatedJob job = job_;
    job.data = data;
    job.spectrum = spectrum.floats();
    const auto stage = [&](std::int64_t items, auto kernel) {
      const std::int64_t parts = std::min<std::int64_t>(threads, items);
      parallel_for(parts, threads, [&](std::int64_t part) {
        const Workspace scratch(static_cast<std::size_t>(kernels_.scratch_floats(job)) * sizeof(float));
        kernel(job, items * part / parts, items * (part + 1) / parts, scratch.floats());
      });
    };
    stage(bands, kernels_.gather);
    stage(blocks, kernels_.respond);
    stage(bands, kernels_.interpolate);
  }

 private:
  const DecimatedKernels& kernels_;
  std::shared_ptr<const Window> rows_, columns_;
  std::shared_ptr<const BoxGain> gain_;
  std::shared_ptr<const Fft<float>> row_fft_, column_fft_;
  DecimatedJob job_;
};

}  // namespace

void filter_decimated(const std::vector<void*>& matrices, DType dtype, const Plan& plan, std::int64_t row_stride,
                      double scale, int threads, const DecimatedKernels& kernels) {
  for (const Decimation& axis : {plan.rows, plan.columns}) {
    require(axis.taps >= kMinTaps && axis.taps <= kMaxTaps, "plan: taps must be between 5 and 9");
  }
  require(plan.rows.cells % kRowCellsMultiple == 0, "plan: cells of the rows must be a multiple of 32");
  require(dtype != DType::kFloat64, "plan: the decimated form has no float64 arithmetic");
  const DecimatedFilter filter(plan, dtype, row_stride, scale, kernels);
  const auto count = static_cast<std::int64_t>(matrices.size());
  if (count >= threads) {
    parallel_for(count, threads, [&](std::int64_t i) { filter.run(matrices[static_cast<std::size_t>(i)], 1); });
  } else {
    for (void* const matrix : matrices) filter.run(matrix, threads);
  }
}

}  // namespace freemerge
