#include "cpu/decimated.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/error.h"
#include "cpu/parallel.h"

namespace freemerge {
namespace {

// exp(-pi i c / cells) of every coarse row c, or nothing where whole bins are kept.
std::vector<float> make_turns(const Plan& plan) {
  std::vector<float> turns;
  if (half_bin(plan.rows, plan.mask.height) == 0) return turns;
  for (std::int64_t row = 0; row < plan.rows.cells; ++row) {
    const double angle = -std::acos(-1.0) * static_cast<double>(row) / static_cast<double>(plan.rows.cells);
    turns.push_back(static_cast<float>(std::cos(angle)));
    turns.push_back(static_cast<float>(std::sin(angle)));
  }
  return turns;
}

class DecimatedFilter : public Filter {
 public:
  DecimatedFilter(const Plan& plan, DType dtype, const DecimatedKernels& kernels)
      : Filter(plan.mask),
        kernels_(kernels),
        background_(plan.background),
        mean_gain_(mask_gain(plan.mask, 0, 0)),
        rows_(make_window(plan.mask.height, plan.rows)),
        columns_(make_window(plan.mask.width, plan.columns)),
        turns_(make_turns(plan)),
        gain_(make_box_gain(plan, rows_, columns_)),
        row_fft_(std::make_shared<const Fft<float>>(plan.columns.cells)),
        column_fft_(plan.rows.cells == plan.columns.cells
                        ? row_fft_
                        : std::make_shared<const Fft<float>>(plan.rows.cells)),
        job_{} {
    job_.dtype = dtype;
    job_.width = plan.mask.width;
    job_.row_window = rows_.view();
    job_.column_window = columns_.view();
    job_.rows = plan.rows;
    job_.columns = plan.columns;
    job_.row_fft = row_fft_.get();
    job_.column_fft = column_fft_.get();
    job_.turns = turns_.empty() ? nullptr : turns_.data();
    job_.gain = gain_.view();
  }

  std::int64_t nbytes() const override {
    const std::int64_t transforms =
        row_fft_->nbytes() + (column_fft_ == row_fft_ ? 0 : column_fft_->nbytes());
    return rows_.nbytes() + columns_.nbytes() + vector_bytes(turns_) + gain_.nbytes() + transforms;
  }

 private:
  std::int64_t bands() const {
    const std::int64_t rows = 2 * kernels_.lanes;
    return (job_.rows.cells + rows - 1) / rows;
  }
  std::int64_t blocks() const { return (job_.columns.band + kernels_.lanes - 1) / kernels_.lanes; }

  std::int64_t spectrum_bytes() const override {
    return blocks() * kernels_.lanes * job_.rows.cells * 2 * static_cast<std::int64_t>(sizeof(float));
  }
  std::int64_t work_bytes() const override {
    return kernels_.work_floats(job_) * static_cast<std::int64_t>(sizeof(float));
  }
  std::int64_t blocks_of_matrix() const override { return std::max(bands(), blocks()); }
  bool takes_means() const override { return job_.dtype == DType::kFloat32; }

  void filter_matrix(void* matrix, const Call& call, void* spectrum, void* const* work,
                     int workers) const override {
    DecimatedJob job = job_;
    job.data = matrix;
    job.stride = call.row_stride;
    job.background = static_cast<float>(call.scale * background_);
    job.mean = call.mean;
    job.mean_result = static_cast<float>(call.scale * mean_gain_ * static_cast<double>(call.mean));
    job.scale = static_cast<float>(call.scale);
    job.spectrum = static_cast<float*>(spectrum);
    const auto stage = [&](std::int64_t items, auto kernel) {
      // One run of items per worker: each run starts with a few rows that its predecessor has too.
      const std::int64_t parts = workers_for(items, workers);
      parallel_for(parts, static_cast<int>(parts), [&](std::int64_t part, int worker) {
        kernel(job, items * part / parts, items * (part + 1) / parts, static_cast<float*>(work[worker]));
      });
    };
    stage(bands(), kernels_.spread);
    stage(blocks(), kernels_.coarse_mask);
    stage(bands(), kernels_.interpolate);
  }

  const DecimatedKernels& kernels_;
  const double background_, mean_gain_;
  const Window rows_, columns_;
  const std::vector<float> turns_;
  const BoxGain gain_;
  const std::shared_ptr<const Fft<float>> row_fft_, column_fft_;
  DecimatedJob job_;  // of any matrix: what a call gives is left out
};

}  // namespace

std::unique_ptr<Filter> make_decimated_filter(const Plan& plan, DType dtype,
                                              const DecimatedKernels& kernels) {
  require(dtype != DType::kFloat64, "the decimated form has no float64 arithmetic");
  const auto windowed = [](const Decimation& axis) { return axis.taps >= kMinTaps && axis.taps <= kMaxTaps; };
  const bool rows = windowed(plan.rows), columns = windowed(plan.columns);
  require((rows || columns) && (rows || is_whole(plan.rows)) && (columns || is_whole(plan.columns)),
          "decimation: taps must be between 6 and 9, or 0 along one axis");
  require(!rows || plan.rows.cells % kRowCellsMultiple == 0,
          "decimation: cells along the height must be a multiple of 32");
  require(half_bin(plan.columns, plan.mask.width) == 0,
          "decimation: real transforms along an odd width have no frequencies around Nyquist");
  return std::make_unique<DecimatedFilter>(plan, dtype, kernels);
}

}  // namespace freemerge
