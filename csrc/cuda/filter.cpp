#include "cuda/filter.h"

#include <algorithm>

#include "common/error.h"
#include "common/window.h"
#include "cuda/coarse_mask.cuh"
#include "cuda/column_filter.cuh"
#include "cuda/decimate_columns.cuh"
#include "cuda/decimate_rows.cuh"
#include "cuda/error.h"
#include "cuda/fft.h"
#include "cuda/heuristics.h"
#include "cuda/interpolate.cuh"
#include "cuda/launch_math.h"
#include "cuda/lines.cuh"
#include "cuda/sample_mean.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kMatricesPerLaunch;

constexpr std::size_t kAlignment = 256;
constexpr std::int64_t kMaxBlocks = 65535;  // of a grid, along the rows of a matrix
constexpr std::int64_t kBinsPerSector = 4;  // complex numbers of the 32 bytes that memory moves at once

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

// Where and how a job runs.
struct Context {
  cudaStream_t stream;
  int device;
  bool capturing;

  const Fft& fft(FftKey key, std::int64_t batch) const {
    key.batch = batch;
    return cached_fft(key, capturing);
  }

  // The work area that these transforms can share, at some batch size.
  std::size_t fft_work(const FftKeys& keys, std::int64_t batch) const {
    std::size_t most = 0;
    for (const FftKey& key : keys) most = std::max(most, fft(key, batch).work_bytes());
    return most;
  }

  // No batch that in_batches() makes needs more: long prime lengths want many times their data, and cuFFT
  // does not promise that fewer transforms want less.
  std::size_t fft_work_bound(const FftKeys& keys, std::size_t limit) const {
    return keys.empty() ? 0 : std::max(limit, fft_work(keys, 1));
  }

  // Visits [0, total) in batches of at most `step`, smaller where the work area would pass its limit.
  template <typename Visit>
  void in_batches(const FftKeys& keys, std::int64_t total, std::int64_t step, std::size_t limit,
                  Visit visit) const {
    for (std::int64_t begin = 0; begin < total;) {
      std::int64_t count = std::min(step, total - begin);
      while (count > 1 && fft_work(keys, count) > limit) count /= 2;
      visit(begin, count);
      begin += count;
    }
  }
};

Context context_of(cudaStream_t stream) { return {stream, current_device(), is_capturing(stream)}; }

// y = background * x + z, z being the coarse grid's correction, interpolated.
class Decimated {
 public:
  Decimated(const FilterJob& job, std::int64_t count, const Context& context)
      : job_(job), context_(context), count_(count), width_(job.plan.mask.width) {
    const std::int64_t height = job.plan.mask.height;
    pitch_ = 2 * (job.columns.cells / 2 + 1);
    const std::int64_t most = std::min<std::int64_t>(kMatricesPerLaunch, count);
    const std::int64_t rows = height * ceil_div(width_, 64) * most / heuristics::kWarpsWanted;
    chunks_.rows = std::max(
        {std::min(rows, heuristics::kMaxChunkRows), heuristics::kMinChunkRows, ceil_div(height, kMaxBlocks)});
    chunks_.rows = heuristics::kAhead * ceil_div(chunks_.rows, heuristics::kAhead);
    chunks_.reach = ceil_div((chunks_.rows - 1) * job.rows.cells, height) + job.rows.taps;
    chunks_.pitch = 2 * ceil_div(width_, 2);
    chunk_count_ = ceil_div(height, chunks_.rows);
    const std::int64_t chunk_bytes = 4 * chunks_.reach * chunks_.pitch;
    group_ = fit(heuristics::kBatchBytes, chunk_count_ * chunk_bytes, 1, most);
    panel_chunks_ = fit(heuristics::kPanelBytes, group_ * chunk_bytes, 1, chunk_count_);
  }

  std::size_t buffer_bytes() {
    Arena arena(nullptr);
    place(arena);
    return arena.used();
  }

  std::size_t work_bytes() const {
    std::size_t most = 0;
    in_groups(
        [&](std::int64_t, std::int64_t count) { most = std::max(most, context_.fft_work(keys(), count)); });
    return most;
  }

  std::size_t work_bound() const { return context_.fft_work_bound(keys(), work_limit()); }

  void run(void* workspace) {
    Arena arena(workspace);
    place(arena);
    in_groups([&](std::int64_t begin, std::int64_t count) { run_group(slice(job_, begin, count)); });
  }

 private:
  FftKey key(cufft::Type type) const {
    return {context_.device, type, job_.rows.cells, job_.columns.cells, 1, pitch_, pitch_ / 2};
  }

  FftKeys keys() const { return {key(cufft::kR2C), key(cufft::kC2R)}; }

  std::size_t work_limit() const {
    return static_cast<std::size_t>(2 * group_ * 4 * job_.rows.cells * pitch_);
  }

  template <typename Visit>
  void in_groups(Visit visit) const {
    context_.in_batches(keys(), count_, group_, work_limit(), visit);
  }

  void place(Arena& arena) {
    grids_ = {arena.take<float>(group_ * job_.rows.cells * pitch_), job_.rows.cells, job_.columns.cells,
              pitch_, static_cast<int>(group_)};
    partials_ = arena.take<float>(group_ * panel_chunks_ * chunks_.reach * chunks_.pitch);
    centers_ = arena.take<float>(group_);
    work_ = arena.rest();
  }

  void transform(cufft::Type type) {
    context_.fft(key(type), grids_.count).execute(grids_.data, grids_.data, work_, context_.stream);
  }

  void run_group(const Matrices& matrices) {
    const Plan& plan = job_.plan;
    const cudaStream_t stream = context_.stream;
    grids_.count = matrices.count;
    const auto grid_bytes = static_cast<std::size_t>(4 * matrices.count * grids_.rows * pitch_);
    check(cudaMemsetAsync(grids_.data, 0, grid_bytes, stream), "cudaMemsetAsync");
    sample_mean({matrices, plan.mask.height, width_, centers_}, stream);
    for (std::int64_t begin = 0; begin < chunk_count_; begin += panel_chunks_)
      down(matrices, begin, std::min(begin + panel_chunks_, chunk_count_));
    transform(cufft::kR2C);
    coarse_mask({grids_, job_.rows, job_.columns, plan.mask, plan.background, job_.scale}, stream);
    transform(cufft::kC2R);
    const double at_zero = mask_gain(plan.mask, 0, 0) - plan.background;
    interpolate({matrices, job_.rows, job_.columns, grids_, chunks_.rows, centers_,
                 static_cast<float>(job_.scale * plan.background), static_cast<float>(job_.scale * at_zero)},
                stream);
  }

  void down(const Matrices& matrices, std::int64_t begin, std::int64_t end) {
    const Decimation window{job_.rows.cells, job_.rows.taps, job_.rows.band, job_.rows.nyquist};
    const std::int64_t height = job_.plan.mask.height;
    chunks_.begin = begin;
    chunks_.end = end;
    down_rows({matrices, job_.rows, chunks_, width_, centers_, partials_}, context_.stream);
    const std::int64_t first = first_cell(begin * chunks_.rows, height, window);
    const std::int64_t last = first_cell(std::min(end * chunks_.rows, height) - 1, height, window);
    const std::int64_t touched = std::min(last - first + job_.rows.taps, job_.rows.cells);
    down_columns({grids_, job_.rows, job_.columns, chunks_, partials_, first, touched}, context_.stream);
  }

  const FilterJob& job_;
  const Context& context_;
  std::int64_t count_;  // matrices
  std::int64_t width_;
  std::int64_t pitch_;         // of the grids
  std::int64_t chunk_count_;   // of a matrix
  std::int64_t group_;         // matrices at a time
  std::int64_t panel_chunks_;  // chunks at a time
  RowChunks chunks_{};
  CoarseGrids grids_{};
  float* partials_ = nullptr;
  float* centers_ = nullptr;
  void* work_ = nullptr;
};

// Rows to half spectra, their columns through the mask, and back.
class Full {
 public:
  Full(const FilterJob& job, std::int64_t count, const Context& context)
      : job_(job), context_(context), count_(count) {
    const Mask& mask = job.plan.mask;
    const std::int64_t pitch = kBinsPerSector * ceil_div(mask.width / 2 + 1, kBinsPerSector);
    spectra_ = {nullptr, mask.height, mask.width, pitch, 0};
    group_ = fit(heuristics::kBatchBytes, 8 * pitch * mask.height, 1,
                 std::min<std::int64_t>(kMatricesPerLaunch, count));
    panel_rows_ = fit(heuristics::kPanelBytes, 8 * pitch, 1, group_ * mask.height);
  }

  std::size_t buffer_bytes() {
    Arena arena(nullptr);
    place(arena);
    return arena.used();
  }

  std::size_t work_bytes() const {
    std::size_t most = 0;
    in_groups([&](std::int64_t begin, std::int64_t count) {
      for_each_run(begin, count, [&](const Run& run) {
        in_panels(run, [&](std::int64_t, std::int64_t, std::int64_t transforms) {
          most = std::max(most, context_.fft_work(row_keys(run.pitch), transforms));
        });
      });
    });
    return most;
  }

  std::size_t work_bound() const {
    return context_.fft_work_bound(row_keys(2 * spectra_.pitch), work_limit());
  }

  void run(void* workspace) {
    Arena arena(workspace);
    place(arena);
    in_groups([&](std::int64_t begin, std::int64_t count) { run_group(begin, count); });
  }

 private:
  // Rows that are equally far apart, of one matrix or of several that follow one another.
  struct Run {
    float* rows;  // null: they are packed where their spectra will be
    std::int64_t pitch;
    std::int64_t first;  // matrix of the group
    std::int64_t count;  // of rows
  };

  void place(Arena& arena) {
    spectra_.data = arena.take<float2>(group_ * spectra_.height * spectra_.pitch);
    work_ = arena.rest();
  }

  // cuFFT transforms rows, or whole matrices where the columns are not for column_filter.
  FftKeys row_keys(std::int64_t pitch) const {
    const std::int64_t rows = job_.roots ? 0 : spectra_.height;
    return {{context_.device, cufft::kR2C, rows, spectra_.width, 1, pitch, spectra_.pitch},
            {context_.device, cufft::kC2R, rows, spectra_.width, 1, pitch, spectra_.pitch}};
  }

  std::size_t work_limit() const {
    const auto spectra = static_cast<std::size_t>(2 * group_ * 8 * spectra_.pitch * spectra_.height);
    return job_.roots ? std::min(heuristics::kWorkBytes, spectra) : spectra;
  }

  template <typename Visit>
  void in_groups(Visit visit) const {
    context_.in_batches({}, count_, group_, 0, visit);
  }

  // Visits (first row, rows, transforms).
  template <typename Visit>
  void in_panels(const Run& run, Visit visit) const {
    const std::int64_t unit = job_.roots ? 1 : spectra_.height;  // rows of a transform
    const std::int64_t step = std::max<std::int64_t>(panel_rows_ / unit, 1);
    context_.in_batches(
        row_keys(run.pitch), run.count / unit, step, work_limit(),
        [&](std::int64_t begin, std::int64_t count) { visit(begin * unit, count * unit, count); });
  }

  // cuFFT reads and writes float matrices where they are, if every row is aligned to two floats.
  template <typename Visit>
  void for_each_run(std::int64_t begin, std::int64_t count, Visit visit) const {
    Run run{nullptr, 2 * spectra_.pitch, 0, 0};
    for (std::int64_t i = 0; i < count; ++i) {
      const auto matrix = static_cast<std::size_t>(begin + i);
      float* rows = static_cast<float*>(job_.matrices[matrix]);
      const std::int64_t stride = job_.row_strides[matrix];
      const bool aligned = reinterpret_cast<std::uintptr_t>(rows) % sizeof(float2) == 0 && stride % 2 == 0;
      const bool direct = job_.dtype == DType::kFloat32 && aligned;
      const bool follows =
          direct ? run.rows && stride == run.pitch && rows == run.rows + run.count * stride : !run.rows;
      if (!follows && run.count > 0) visit(run);
      if (!follows || run.count == 0)
        run = {direct ? rows : nullptr, direct ? stride : 2 * spectra_.pitch, i, 0};
      run.count += spectra_.height;
    }
    visit(run);
  }

  void run_group(std::int64_t begin, std::int64_t count) {
    spectra_.count = static_cast<int>(count);
    for_each_run(begin, count, [&](const Run& run) { rows(run, begin, cufft::kR2C); });
    columns();
    for_each_run(begin, count, [&](const Run& run) { rows(run, begin, cufft::kC2R); });
  }

  // The rows' transforms, one way.
  void rows(const Run& run, std::int64_t begin, cufft::Type type) {
    const bool forward = type == cufft::kR2C;
    in_panels(run, [&](std::int64_t first, std::int64_t count, std::int64_t transforms) {
      float2* spectra = spectra_.data + (run.first * spectra_.height + first) * spectra_.pitch;
      float* reals = run.rows ? run.rows + first * run.pitch : reinterpret_cast<float*>(spectra);
      const FftKey key = row_keys(run.pitch)[forward ? 0 : 1];
      if (!run.rows && forward) pack(lines(run, begin, first, count), context_.stream);
      void* in = forward ? static_cast<void*>(reals) : spectra;
      void* out = forward ? static_cast<void*>(spectra) : reals;
      context_.fft(key, transforms).execute(in, out, work_, context_.stream);
      if (!run.rows && !forward) unpack(lines(run, begin, first, count), context_.stream);
    });
  }

  LineCopy lines(const Run& run, std::int64_t begin, std::int64_t first, std::int64_t count) const {
    const std::int64_t height = spectra_.height;
    const std::int64_t first_matrix = run.first + first / height;
    const std::int64_t last_matrix = run.first + (first + count - 1) / height;
    return {
        slice(job_, begin + first_matrix, last_matrix - first_matrix + 1),
        {spectra_.data + first_matrix * height * spectra_.pitch, height, spectra_.width, spectra_.pitch, 0},
        first % height,
        count};
  }

  void columns() {
    const Mask& mask = job_.plan.mask;
    const double size = static_cast<double>(mask.height) * static_cast<double>(mask.width);
    const double factor = job_.scale / size;
    const ColumnFilter filter{
        spectra_,
        mask,
        factor,
        job_.gains,
        job_.steps,
        {static_cast<float>(factor * mask.gain0), static_cast<float>(factor * mask.gain1),
         static_cast<float>(factor * mask.gain2)},
        job_.roots};
    if (job_.roots) {
      column_filter(filter, context_.stream);
      return;
    }
    column_mask(filter, context_.stream);
  }

  const FilterJob& job_;
  const Context& context_;
  std::int64_t count_;       // matrices
  std::int64_t group_;       // matrices at a time
  std::int64_t panel_rows_;  // rows at a time
  Spectra spectra_{};
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
    require(!job.rows.whole(), "the rows axis must have a window");
    require(job.columns.whole() || job.columns.padded == job.rows.padded, "windows must be padded alike");
    return;
  }
  require(plan.form == Form::kFull, "the form must be decimated or full");
  require(job.gains != nullptr, "the full form needs the gains of its columns");
  require(!job.steps || mask.kind == MaskKind::kSteps, "only a mask of steps has them");
  require(!job.roots || column_filter_takes(mask.height), "the columns are too long for shared memory");
}

// Calls visit(executor) with what runs the plan on `count` matrices.
template <typename Visit>
decltype(auto) with_executor(const FilterJob& job, std::int64_t count, const Context& context, Visit visit) {
  if (job.plan.form == Form::kDecimated) {
    Decimated executor(job, count, context);
    return visit(executor);
  }
  Full executor(job, count, context);
  return visit(executor);
}

std::size_t bytes_for(const FilterJob& job, const Context& context) {
  return with_executor(job, static_cast<std::int64_t>(job.matrices.size()), context,
                       [](auto& executor) { return executor.buffer_bytes() + executor.work_bytes(); });
}

// Fewer matrices may need more: panels fill their budget differently.
std::size_t bytes_for_any_number(const FilterJob& job, const Context& context) {
  std::size_t most = 0;
  for (std::int64_t count = 1; count <= kMatricesPerLaunch; ++count) {
    most = std::max(
        most, with_executor(job, count, context, [](auto& e) { return e.buffer_bytes() + e.work_bound(); }));
  }
  return most;
}

}  // namespace

std::size_t filter_workspace(const FilterJob& job, cudaStream_t stream) {
  check_job(job);
  const Context context = context_of(stream);
  return job.matrices.empty() ? bytes_for_any_number(job, context) : bytes_for(job, context);
}

void filter(const FilterJob& job, void* workspace, std::size_t workspace_bytes, cudaStream_t stream) {
  check_job(job);
  const Context context = context_of(stream);
  require(bytes_for(job, context) <= workspace_bytes, "the workspace is too small");
  with_executor(job, static_cast<std::int64_t>(job.matrices.size()), context,
                [&](auto& executor) { executor.run(workspace); });
}

}  // namespace freemerge::cuda
