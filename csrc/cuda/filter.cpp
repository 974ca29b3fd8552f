#include "cuda/filter.h"

#include <algorithm>

#include "cuda/coarse_mask.cuh"
#include "cuda/column_mask.cuh"
#include "cuda/decimate_columns.cuh"
#include "cuda/decimate_rows.cuh"
#include "cuda/error.h"
#include "cuda/fft.h"
#include "cuda/heuristics.h"
#include "cuda/launch_math.h"
#include "cuda/lines.cuh"
#include "cuda/sample_mean.cuh"
#include "error.h"

namespace freemerge::cuda {
namespace {

using heuristics::kMatricesPerLaunch;

constexpr std::size_t kAlignment = 256;
constexpr std::int64_t kMaxPanelRows = std::int64_t{1} << 19;  // keeps every grid axis below 65536 blocks

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Hands out parts of the workspace; with no memory behind it, it only adds them up.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* part = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_ = 0;
};

// How many items of `bytes` fit into a budget, within limits.
std::int64_t fit(std::size_t budget, std::int64_t bytes, std::int64_t low, std::int64_t high) {
  const std::int64_t count = static_cast<std::int64_t>(budget) / std::max<std::int64_t>(bytes, 1);
  return std::min(std::max(count, low), std::max(low, high));
}

Matrices slice(const FilterJob& job, std::size_t begin, std::int64_t count) {
  Matrices matrices{};
  matrices.count = static_cast<int>(count);
  matrices.dtype = job.dtype;
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    matrices.data[i] = job.matrices[begin + i];
    matrices.row_stride[i] = job.row_strides[begin + i];
  }
  return matrices;
}

// The largest batch up to `wanted` whose work area is within bounds: long prime lengths need much more than
// their data.
std::int64_t fft_batch(FftKey key, std::int64_t wanted, cudaStream_t stream) {
  key.batch = wanted;
  while (key.batch > 1 && cached_fft(key, stream).work_bytes() > heuristics::kWorkBytes) key.batch /= 2;
  return key.batch;
}

// y = background * x + z, z being the coarse grid's correction, interpolated.
class Decimated {
 public:
  Decimated(const FilterJob& job, cudaStream_t stream)
      : job_(job), stream_(stream), device_(current_device()), width_(job.plan.mask.width) {
    const std::int64_t extra = padded_taps(job.rows.taps) - 1;
    pitch_ = 2 * (job.columns.cells / 2 + 1);
    const std::int64_t coarse_bytes = 4 * job.rows.cells * pitch_;
    const std::int64_t row_bytes = 4 * width_;
    group_ = fit(heuristics::kBatchBytes, std::max(coarse_bytes, (job.rows.cells + extra) * row_bytes), 1,
                 std::min<std::int64_t>(kMatricesPerLaunch, limit()));
    const std::int64_t rows = std::min(job.rows.cells, kMaxPanelRows);
    panel_cells_ = fit(heuristics::kPanelBytes, group_ * row_bytes,
                       std::min(rows, heuristics::kMinCellsPerBlock + extra), rows + extra) -
                   extra;
    panel_cells_ = std::max<std::int64_t>(panel_cells_, 1);
    panel_rows_ = panel_cells_ + extra;
  }

  // Of a whole group, and of what is left over after the last one: cuFFT may want more for a smaller batch.
  std::size_t workspace() {
    std::size_t most = 0;
    const std::int64_t rest = static_cast<std::int64_t>(job_.matrices.size()) % group_;
    for (const std::int64_t count : {group_, rest == 0 ? group_ : rest}) {
      Arena arena(nullptr);
      place(arena, count);
      most = std::max(most, arena.used());
    }
    return most;
  }

  void run(void* workspace) {
    for (std::size_t begin = 0; begin < job_.matrices.size(); begin += static_cast<std::size_t>(group_)) {
      Arena arena(workspace);
      const auto left = static_cast<std::int64_t>(job_.matrices.size() - begin);
      const std::int64_t count = std::min(group_, left);
      place(arena, count);
      run_group(slice(job_, begin, count));
    }
  }

 private:
  std::int64_t limit() const {
    return job_.matrices.empty() ? kMatricesPerLaunch : static_cast<std::int64_t>(job_.matrices.size());
  }

  FftKey key(cufft::Type type, std::int64_t batch) const {
    return {device_, type, job_.rows.cells, job_.columns.cells, batch};
  }

  void place(Arena& arena, std::int64_t count) {
    grids_ = {arena.take<float>(count * job_.rows.cells * pitch_), job_.rows.cells, job_.columns.cells,
              pitch_, static_cast<int>(count)};
    panel_ = arena.take<float>(count * panel_rows_ * width_);
    centers_ = arena.take<float>(count);
    const std::size_t work = std::max(cached_fft(key(cufft::kR2C, count), stream_).work_bytes(),
                                      cached_fft(key(cufft::kC2R, count), stream_).work_bytes());
    work_ = arena.take<char>(static_cast<std::int64_t>(work));
  }

  void run_group(const Matrices& matrices) {
    const Plan& plan = job_.plan;
    sample_mean({matrices, plan.mask.height, width_, centers_}, stream_);
    for (std::int64_t cell = 0; cell < job_.rows.cells; cell += panel_cells_) {
      const std::int64_t cells = std::min(panel_cells_, job_.rows.cells - cell);
      down_rows({matrices, job_.rows, width_, cell, cells, centers_, panel_}, stream_);
      down_columns({grids_, job_.columns, panel_, cell, cells}, stream_);
    }
    cached_fft(key(cufft::kR2C, grids_.count), stream_).execute(grids_.data, work_, stream_);
    coarse_mask({grids_, job_.rows, job_.columns, plan.mask, plan.background, job_.scale}, stream_);
    cached_fft(key(cufft::kC2R, grids_.count), stream_).execute(grids_.data, work_, stream_);
    const auto gain = static_cast<float>(job_.scale * plan.background);
    const double at_zero = mask_gain(plan.mask, 0, 0) - plan.background;
    const auto center_gain = static_cast<float>(job_.scale * at_zero);
    for (std::int64_t cell = 0; cell < job_.rows.cells; cell += panel_cells_) {
      const std::int64_t cells = std::min(panel_cells_, job_.rows.cells - cell);
      const std::int64_t reach = padded_taps(job_.rows.taps) - 1;
      up_columns({grids_, job_.columns, panel_, cell, cells + reach}, stream_);
      up_rows({matrices, job_.rows, width_, cell, cells, centers_, panel_, gain, center_gain}, stream_);
    }
  }

  const FilterJob& job_;
  cudaStream_t stream_;
  int device_;
  std::int64_t width_;
  std::int64_t pitch_;
  std::int64_t group_;        // matrices at a time
  std::int64_t panel_cells_;  // coarse rows at a time
  std::int64_t panel_rows_;   // and those that their windows reach in addition
  CoarseGrids grids_{};
  float* panel_ = nullptr;
  float* centers_ = nullptr;
  char* work_ = nullptr;
};

// y = background * x + z, z being what the mask makes of some columns of the spectrum; all of them in the
// full form.
class Columns {
 public:
  Columns(const FilterJob& job, cudaStream_t stream)
      : job_(job), stream_(stream), device_(current_device()), transposed_(job.plan.transposed) {
    const Mask& mask = job.plan.mask;
    length_ = transposed_ ? mask.height : mask.width;
    lines_ = transposed_ ? mask.width : mask.height;
    pitch_ = 2 * (length_ / 2 + 1);
    const std::int64_t limit =
        job.matrices.empty() ? kMatricesPerLaunch : static_cast<std::int64_t>(job.matrices.size());
    group_ = fit(heuristics::kBatchBytes, 8 * job.column_count * lines_, 1,
                 std::min<std::int64_t>(kMatricesPerLaunch, limit));
    stage_lines_ = fit(heuristics::kPanelBytes, 4 * pitch_, 1, group_ * lines_);
    stage_lines_ = std::min(fft_batch(key(cufft::kR2C, length_, 1), stage_lines_, stream),
                            fft_batch(key(cufft::kC2R, length_, 1), stage_lines_, stream));
    panel_columns_ = fit(heuristics::kPanelBytes, 8 * lines_, 1, group_ * job.column_count);
    if (lines_ > 1) panel_columns_ = fft_batch(key(cufft::kC2C, lines_, 1), panel_columns_, stream);
  }

  // Of a whole group, and of what is left over after the last one: cuFFT may want more for a smaller batch.
  std::size_t workspace() {
    std::size_t most = 0;
    const std::int64_t rest = static_cast<std::int64_t>(job_.matrices.size()) % group_;
    for (const std::int64_t count : {group_, rest == 0 ? group_ : rest}) {
      Arena arena(nullptr);
      place(arena, count);
      most = std::max(most, arena.used());
    }
    return most;
  }

  void run(void* workspace) {
    for (std::size_t begin = 0; begin < job_.matrices.size(); begin += static_cast<std::size_t>(group_)) {
      Arena arena(workspace);
      const auto left = static_cast<std::int64_t>(job_.matrices.size() - begin);
      const std::int64_t count = std::min(group_, left);
      place(arena, count);
      run_group(slice(job_, begin, count));
    }
  }

 private:
  FftKey key(cufft::Type type, std::int64_t length, std::int64_t batch) const {
    return {device_, type, 0, length, batch};
  }

  // Visits [0, total) in steps, the last one shorter.
  template <typename Visit>
  static void in_steps(std::int64_t total, std::int64_t step, Visit visit) {
    for (std::int64_t begin = 0; begin < total; begin += step) visit(begin, std::min(step, total - begin));
  }

  void place(Arena& arena, std::int64_t count) {
    spectrum_ = {arena.take<float2>(count * job_.column_count * lines_), job_.bins, job_.place,
                 job_.column_count};
    const std::int64_t most = std::min(stage_lines_, count * lines_);
    stage_ = {arena.take<float>(most * pitch_), length_, pitch_, lines_, 0, 0};
    std::size_t work = 0;
    in_steps(count * lines_, stage_lines_, [&](std::int64_t, std::int64_t batch) {
      for (const cufft::Type type : {cufft::kR2C, cufft::kC2R})
        work = std::max(work, cached_fft(key(type, length_, batch), stream_).work_bytes());
    });
    if (lines_ > 1) {
      in_steps(count * job_.column_count, panel_columns_, [&](std::int64_t, std::int64_t batch) {
        work = std::max(work, cached_fft(key(cufft::kC2C, lines_, batch), stream_).work_bytes());
      });
    }
    work_ = arena.take<char>(static_cast<std::int64_t>(work));
  }

  Stage stage(std::int64_t begin, std::int64_t count) const {
    Stage part = stage_;
    part.line_begin = begin;
    part.line_count = count;
    return part;
  }

  void transform_lines(cufft::Type type, std::int64_t count) {
    cached_fft(key(type, length_, count), stream_).execute(stage_.data, work_, stream_);
  }

  void filter_columns(std::int64_t begin, std::int64_t count) {
    const Plan& plan = job_.plan;
    float2* columns = spectrum_.data + begin * lines_;
    const auto transform = [&](int direction) {
      if (lines_ == 1) return;  // its own spectrum
      cached_fft(key(cufft::kC2C, lines_, count), stream_).execute(columns, work_, stream_, direction);
    };
    transform(cufft::kForward);
    column_mask({spectrum_, lines_, begin, count, plan.mask, transposed_, plan.background, job_.scale},
                stream_);
    transform(cufft::kInverse);
  }

  void run_group(const Matrices& matrices) {
    const std::int64_t lines = matrices.count * lines_;
    in_steps(lines, stage_lines_, [&](std::int64_t begin, std::int64_t count) {
      pack({matrices, transposed_, stage(begin, count), 1.0f}, stream_);
      transform_lines(cufft::kR2C, count);
      gather({stage(begin, count), spectrum_}, stream_);
    });
    in_steps(matrices.count * job_.column_count, panel_columns_,
             [&](std::int64_t begin, std::int64_t count) { filter_columns(begin, count); });
    const auto gain = static_cast<float>(job_.scale * job_.plan.background);
    in_steps(lines, stage_lines_, [&](std::int64_t begin, std::int64_t count) {
      scatter({stage(begin, count), spectrum_}, stream_);
      transform_lines(cufft::kC2R, count);
      unpack({matrices, transposed_, stage(begin, count), gain}, stream_);
    });
  }

  const FilterJob& job_;
  cudaStream_t stream_;
  int device_;
  bool transposed_;
  std::int64_t length_;         // of a line
  std::int64_t lines_;          // of a matrix
  std::int64_t pitch_;          // floats from line to line of the stage
  std::int64_t group_;          // matrices at a time
  std::int64_t stage_lines_;    // lines at a time
  std::int64_t panel_columns_;  // columns at a time
  Spectrum spectrum_{};
  Stage stage_{};
  char* work_ = nullptr;
};

void check_job(const FilterJob& job) {
  const Plan& plan = job.plan;
  const Mask& mask = plan.mask;
  require(job.matrices.size() == job.row_strides.size(), "row_strides must hold one number per matrix");
  require(mask.height > 0 && mask.width > 0, "height and width must be positive");
  if (plan.form == Form::kDecimated) {
    require(job.rows.samples == mask.height && job.columns.samples == mask.width,
            "the windows must cover the matrix");
    require(job.rows.taps <= kMaxTaps && job.columns.taps <= kMaxTaps, "windows have at most 12 taps");
    return;
  }
  require(plan.form == Form::kPruned || plan.form == Form::kFull,
          "the form must be decimated, pruned or full");
  const std::int64_t half = (plan.transposed ? mask.height : mask.width) / 2 + 1;
  require(job.column_count > 0 && job.column_count <= half,
          "the columns must be some of the half spectrum's");
}

template <typename Visit>
decltype(auto) with_executor(const FilterJob& job, cudaStream_t stream, Visit visit) {
  check_job(job);
  if (job.plan.form == Form::kDecimated) {
    Decimated executor(job, stream);
    return visit(executor);
  }
  Columns executor(job, stream);
  return visit(executor);
}

}  // namespace

std::size_t filter_workspace(const FilterJob& job, cudaStream_t stream) {
  return with_executor(job, stream, [](auto& executor) { return executor.workspace(); });
}

void filter(const FilterJob& job, void* workspace, std::size_t workspace_bytes, cudaStream_t stream) {
  with_executor(job, stream, [&](auto& executor) {
    require(executor.workspace() <= workspace_bytes, "the workspace is too small");
    executor.run(workspace);
  });
}

}  // namespace freemerge::cuda
