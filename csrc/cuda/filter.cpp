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
  void* rest() const { return memory_ ? memory_ + used_ : nullptr; }

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

using FftKeys = std::vector<FftKey>;

// The work area that these transforms can share, at some batch size.
std::size_t fft_work(const FftKeys& keys, std::int64_t batch, cudaStream_t stream) {
  std::size_t most = 0;
  for (FftKey key : keys) {
    key.batch = batch;
    most = std::max(most, cached_fft(key, stream).work_bytes());
  }
  return most;
}

// No batch that in_batches() makes needs more: long prime lengths want many times their data, and cuFFT does
// not promise that fewer transforms want less.
std::size_t fft_work_bound(const FftKeys& keys, cudaStream_t stream) {
  return std::max(heuristics::kWorkBytes, fft_work(keys, 1, stream));
}

// Visits [0, total) in batches of at most `step`, smaller where the work area would pass its bound.
template <typename Visit>
void in_batches(const FftKeys& keys, std::int64_t total, std::int64_t step, cudaStream_t stream,
                Visit visit) {
  for (std::int64_t begin = 0; begin < total;) {
    std::int64_t count = std::min(step, total - begin);
    while (count > 1 && fft_work(keys, count, stream) > heuristics::kWorkBytes) count /= 2;
    visit(begin, count);
    begin += count;
  }
}

// y = background * x + z, z being the coarse grid's correction, interpolated.
class Decimated {
 public:
  Decimated(const FilterJob& job, std::int64_t count, cudaStream_t stream)
      : job_(job), count_(count), stream_(stream), device_(current_device()), width_(job.plan.mask.width) {
    const std::int64_t extra = padded_taps(job.rows.taps) - 1;
    pitch_ = 2 * (job.columns.cells / 2 + 1);
    const std::int64_t coarse_bytes = 4 * job.rows.cells * pitch_;
    const std::int64_t row_bytes = 4 * width_;
    group_ = fit(heuristics::kBatchBytes, std::max(coarse_bytes, (job.rows.cells + extra) * row_bytes), 1,
                 std::min<std::int64_t>(kMatricesPerLaunch, count));
    const std::int64_t rows = std::min(job.rows.cells, kMaxPanelRows);
    panel_cells_ = fit(heuristics::kPanelBytes, group_ * row_bytes,
                       std::min(rows, heuristics::kMinCellsPerBlock + extra), rows + extra) -
                   extra;
    panel_cells_ = std::max<std::int64_t>(panel_cells_, 1);
    panel_rows_ = panel_cells_ + extra;
  }

  std::size_t buffer_bytes() {
    Arena arena(nullptr);
    place(arena);
    return arena.used();
  }

  std::size_t work_bytes() const {
    std::size_t most = 0;
    in_groups(
        [&](std::int64_t, std::int64_t count) { most = std::max(most, fft_work(keys(), count, stream_)); });
    return most;
  }

  std::size_t work_bound() const { return fft_work_bound(keys(), stream_); }

  void run(void* workspace) {
    Arena arena(workspace);
    place(arena);
    in_groups([&](std::int64_t begin, std::int64_t count) { run_group(slice(job_, begin, count)); });
  }

 private:
  FftKey key(cufft::Type type, std::int64_t batch) const {
    return {device_, type, job_.rows.cells, job_.columns.cells, batch};
  }

  FftKeys keys() const { return {key(cufft::kR2C, 1), key(cufft::kC2R, 1)}; }

  template <typename Visit>
  void in_groups(Visit visit) const {
    in_batches(keys(), count_, group_, stream_, visit);
  }

  void place(Arena& arena) {
    grids_ = {arena.take<float>(group_ * job_.rows.cells * pitch_), job_.rows.cells, job_.columns.cells,
              pitch_, static_cast<int>(group_)};
    panel_ = arena.take<float>(group_ * panel_rows_ * width_);
    centers_ = arena.take<float>(group_);
    work_ = arena.rest();
  }

  void run_group(const Matrices& matrices) {
    const Plan& plan = job_.plan;
    grids_.count = matrices.count;
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
  std::int64_t count_;  // matrices
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
  void* work_ = nullptr;
};

// y = background * x + z, z being what the mask makes of some columns of the spectrum; all of them in the
// full form.
class Columns {
 public:
  Columns(const FilterJob& job, std::int64_t count, cudaStream_t stream)
      : job_(job),
        count_(count),
        stream_(stream),
        device_(current_device()),
        transposed_(job.plan.transposed) {
    const Mask& mask = job.plan.mask;
    length_ = transposed_ ? mask.height : mask.width;
    lines_ = transposed_ ? mask.width : mask.height;
    pitch_ = 2 * (length_ / 2 + 1);
    // Kernels split the numbers of lines and columns of several matrices, or of a panel, in 32 bits.
    static_assert(heuristics::kBatchBytes >> 32 == 0 && heuristics::kPanelBytes >> 32 == 0);
    group_ = fit(heuristics::kBatchBytes, 8 * job.column_count * lines_, 1,
                 std::min<std::int64_t>(kMatricesPerLaunch, count));
    stage_lines_ = fit(heuristics::kPanelBytes, 4 * pitch_, 1, group_ * lines_);
    panel_columns_ = fit(heuristics::kPanelBytes, 8 * lines_, 1, group_ * job.column_count);
  }

  std::size_t buffer_bytes() {
    Arena arena(nullptr);
    place(arena);
    return arena.used();
  }

  std::size_t work_bytes() const {
    std::size_t most = 0;
    in_groups([&](std::int64_t, std::int64_t count) {
      in_stages(count, [&](std::int64_t, std::int64_t batch) {
        most = std::max(most, fft_work(line_keys(), batch, stream_));
      });
      in_panels(count, [&](std::int64_t, std::int64_t batch) {
        most = std::max(most, fft_work(column_keys(), batch, stream_));
      });
    });
    return most;
  }

  std::size_t work_bound() const {
    return std::max(fft_work_bound(line_keys(), stream_), fft_work_bound(column_keys(), stream_));
  }

  void run(void* workspace) {
    Arena arena(workspace);
    place(arena);
    in_groups([&](std::int64_t begin, std::int64_t count) { run_group(slice(job_, begin, count)); });
  }

 private:
  FftKey key(cufft::Type type, std::int64_t length) const { return {device_, type, 0, length, 1}; }

  FftKeys line_keys() const { return {key(cufft::kR2C, length_), key(cufft::kC2R, length_)}; }

  FftKeys column_keys() const {  // a column of one entry is its own spectrum
    return lines_ > 1 ? FftKeys{key(cufft::kC2C, lines_)} : FftKeys{};
  }

  template <typename Visit>
  void in_groups(Visit visit) const {
    in_batches({}, count_, group_, stream_, visit);
  }

  template <typename Visit>
  void in_stages(std::int64_t matrices, Visit visit) const {
    in_batches(line_keys(), matrices * lines_, stage_lines_, stream_, visit);
  }

  template <typename Visit>
  void in_panels(std::int64_t matrices, Visit visit) const {
    in_batches(column_keys(), matrices * job_.column_count, panel_columns_, stream_, visit);
  }

  void place(Arena& arena) {
    spectrum_ = {arena.take<float2>(group_ * job_.column_count * lines_), job_.bins, job_.place,
                 job_.column_count};
    stage_ = {arena.take<float>(stage_lines_ * pitch_), length_, pitch_, lines_, 0, 0};
    work_ = arena.rest();
  }

  Stage stage(std::int64_t begin, std::int64_t count) const {
    Stage part = stage_;
    part.line_begin = begin;
    part.line_count = count;
    return part;
  }

  void transform(FftKey key, std::int64_t batch, void* data, int direction = cufft::kForward) {
    key.batch = batch;
    cached_fft(key, stream_).execute(data, work_, stream_, direction);
  }

  void filter_columns(std::int64_t begin, std::int64_t count) {
    const Plan& plan = job_.plan;
    float2* columns = spectrum_.data + begin * lines_;
    for (const FftKey& key : column_keys()) transform(key, count, columns);
    column_mask({spectrum_, lines_, begin, count, plan.mask, transposed_, plan.background, job_.scale},
                stream_);
    for (const FftKey& key : column_keys()) transform(key, count, columns, cufft::kInverse);
  }

  void run_group(const Matrices& matrices) {
    in_stages(matrices.count, [&](std::int64_t begin, std::int64_t count) {
      pack({matrices, transposed_, stage(begin, count), 1.0f}, stream_);
      transform(key(cufft::kR2C, length_), count, stage_.data);
      gather({stage(begin, count), spectrum_}, stream_);
    });
    in_panels(matrices.count, [&](std::int64_t begin, std::int64_t count) { filter_columns(begin, count); });
    const auto gain = static_cast<float>(job_.scale * job_.plan.background);
    in_stages(matrices.count, [&](std::int64_t begin, std::int64_t count) {
      scatter({stage(begin, count), spectrum_}, stream_);
      transform(key(cufft::kC2R, length_), count, stage_.data);
      unpack({matrices, transposed_, stage(begin, count), gain}, stream_);
    });
  }

  const FilterJob& job_;
  std::int64_t count_;  // matrices
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
  void* work_ = nullptr;
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

// Calls visit(executor) with what runs the plan on `count` matrices.
template <typename Visit>
decltype(auto) with_executor(const FilterJob& job, std::int64_t count, cudaStream_t stream, Visit visit) {
  if (job.plan.form == Form::kDecimated) {
    Decimated executor(job, count, stream);
    return visit(executor);
  }
  Columns executor(job, count, stream);
  return visit(executor);
}

std::size_t bytes_for(const FilterJob& job, cudaStream_t stream) {
  return with_executor(job, static_cast<std::int64_t>(job.matrices.size()), stream,
                       [](auto& executor) { return executor.buffer_bytes() + executor.work_bytes(); });
}

// Fewer matrices may need more: panels fill their budget differently.
std::size_t bytes_for_any_number(const FilterJob& job, cudaStream_t stream) {
  std::size_t most = 0;
  for (std::int64_t count = 1; count <= kMatricesPerLaunch; ++count) {
    most = std::max(most, with_executor(job, count, stream, [](auto& e) { return e.buffer_bytes(); }));
  }
  return most + with_executor(job, 1, stream, [](auto& executor) { return executor.work_bound(); });
}

}  // namespace

std::size_t filter_workspace(const FilterJob& job, cudaStream_t stream) {
  check_job(job);
  return job.matrices.empty() ? bytes_for_any_number(job, stream) : bytes_for(job, stream);
}

void filter(const FilterJob& job, void* workspace, std::size_t workspace_bytes, cudaStream_t stream) {
  check_job(job);
  require(bytes_for(job, stream) <= workspace_bytes, "the workspace is too small");
  with_executor(job, static_cast<std::int64_t>(job.matrices.size()), stream,
                [&](auto& executor) { executor.run(workspace); });
}

}  // namespace freemerge::cuda
