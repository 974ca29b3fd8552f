#include <algorithm>

#include "common/window.h"
#include "cuda/accumulate.cuh"
#include "cuda/coarse_bins.h"
#include "cuda/coarse_mask.cuh"
#include "cuda/error.h"
#include "cuda/executor.h"
#include "cuda/heuristics.h"
#include "cuda/interpolate.cuh"
#include "cuda/launch_math.h"
#include "cuda/sample_mean.cuh"
#include "cuda/spread_columns.cuh"
#include "cuda/spread_rows.cuh"
#include "cuda/spread_sum.cuh"

namespace freemerge::cuda {
namespace {

constexpr std::int64_t kMaxBlocks = 65535;  // of a grid, along the rows of a matrix

// y = background * x + z, z being the coarse grid's correction, interpolated.
class Decimated : public Executor {
 public:
  explicit Decimated(const Call& call)
      : Executor(call),
        own_(call.filter.plan.tiles.parts > 0),
        rows_(call.filter.rows),
        columns_(call.filter.columns),
        transformed_(grid_rows(rows_, rows_.samples)),
        pitch_(4 * (columns_.cells / 4 + 1)) {
    const std::int64_t height = rows_.samples;
    const std::int64_t width = columns_.samples;
    chunks_.pitch = kColumnsPerThread * ceil_div(width, kColumnsPerThread);
    // Of no more matrices than a batch holds, no more blocks than fit at once.
    const std::int64_t most = fit(heuristics::kBatchBytes, 4 * transformed_ * chunks_.pitch, 1,
                                  std::min<std::int64_t>(heuristics::kMatricesPerLaunch, call.count));
    const std::int64_t across = ceil_div(width, kColumnsPerBlock) * most;
    const std::int64_t chunks = std::max<std::int64_t>(heuristics::kBlocksWanted / across, 1);
    chunks_.rows =
        std::max({ceil_div(height, chunks), heuristics::kMinChunkRows, ceil_div(height, kMaxBlocks)});
    if (call.filter.chunk_rows > 0) chunks_.rows = call.filter.chunk_rows;
    chunks_.rows = heuristics::kTileRows * ceil_div(chunks_.rows, heuristics::kTileRows);
    chunks_.reach = ceil_div((chunks_.rows - 1) * rows_.cells, height) + rows_.taps;
    chunk_count_ = ceil_div(height, chunks_.rows);
    const std::int64_t chunk_bytes = 4 * chunks_.reach * chunks_.pitch;
    group_ = fit(heuristics::kBatchBytes, chunk_count_ * chunk_bytes, 1, most);
    panel_chunks_ = fit(heuristics::kPanelBytes, group_ * chunk_bytes, 1, chunk_count_);
  }

 private:
  void place(Arena& arena) override {
    grids_ = {arena.take<float>(group_ * grid_step()), rows_.cells, columns_.cells, pitch_, grid_step(), 0};
    partials_ = arena.take<float>(group_ * panel_chunks_ * chunks_.reach * chunks_.pitch);
    centers_ = arena.take<float>(group_);
    if (call_.sum) {
      samples_ = arena.take<float>(sample_rows(rows_.samples) * sample_columns(columns_.samples));
      sums_ = arena.take<double>((call_.sum->vectors.count + 1) * blocks());
      energies_ = arena.take<double>(energy_parts());
    }
    work_ = arena.rest();
  }

  std::size_t work_bytes() const override {
    std::size_t most = 0;
    in_groups([&](std::int64_t, std::int64_t count) { most = std::max(most, fft_work(keys(), count)); });
    return most;
  }

  std::size_t work_bound() const override { return own_ ? 0 : fft_work_bound(keys(), work_limit()); }

  void run_groups() override {
    in_groups([&](std::int64_t begin, std::int64_t count) { run_group(slice(begin, count)); });
  }

  // Floats from grid to grid.
  std::int64_t grid_step() const { return transformed_ * pitch_; }

  FftKey key(cufft::Type type) const {
    return {call_.device, type, transformed_, columns_.cells, 1, pitch_, pitch_ / 2};
  }

  FftKeys keys() const {
    if (own_) return {};
    return {key(cufft::kR2C), key(cufft::kC2R)};
  }

  std::size_t work_limit() const { return static_cast<std::size_t>(2 * group_ * 4 * grid_step()); }

  template <typename Visit>
  void in_groups(Visit visit) const {
    in_batches(keys(), call_.count, group_, work_limit(), visit);
  }

  void transform(cufft::Type type) {
    fft(key(type), grids_.count).execute(grids_.data, grids_.data, work_, call_.stream);
  }

  void run_group(const Matrices& matrices) {
    const cudaStream_t stream = call_.stream;
    grids_.count = matrices.count;
    const auto grid_bytes = static_cast<std::size_t>(4 * matrices.count * grid_step());
    check(cudaMemsetAsync(grids_.data, 0, grid_bytes, stream), "cudaMemsetAsync");
    find_centers(matrices);
    for (std::int64_t begin = 0; begin < chunk_count_; begin += panel_chunks_)
      spread(matrices, begin, std::min(begin + panel_chunks_, chunk_count_));
    filter_grids();
    if (!call_.sum) return interpolate_grids(matrices, {});
    finish_sum(*call_.sum, {sums_, blocks()}, rows_.samples * columns_.samples, {energies_, energy_parts()},
               stream);
  }

  void add_last(const AddLast& add) override {
    grids_.count = 1;
    interpolate_grids(slice(0, 1), add);
  }

  void find_centers(const Matrices& matrices) {
    const std::int64_t height = rows_.samples;
    const std::int64_t width = columns_.samples;
    if (!call_.sum) return sample_mean({matrices, height, width, centers_}, call_.stream);
    sample_sum(call_.sum->vectors, height, width, samples_, call_.stream);
    Matrices samples{{samples_}, {sample_columns(width)}, 1, DType::kFloat32};
    sample_mean({samples, sample_rows(height), sample_columns(width), centers_}, call_.stream);
  }

  void filter_grids() {
    const Filter& filter = call_.filter;
    if (own_) {
      const RowPass rows = row_pass(filter.spectra, grids(), grid_spectra(), call_.scale);
      filter_spectra(filter.spectra, rows, call_.stream, {energies_, centers_});
      return spectra_to_rows(rows, call_.stream);
    }
    transform(cufft::kR2C);
    coarse_mask(
        {grids_, rows_, columns_, filter.plan.mask, filter.plan.background, call_.scale, energies_, centers_},
        call_.stream);
    transform(cufft::kC2R);
  }

  Matrices grids() const {
    Matrices matrices{};
    matrices.count = grids_.count;
    matrices.dtype = DType::kFloat32;
    for (int i = 0; i < grids_.count; ++i) {
      matrices.data[i] = grids_.data + i * grid_step();
      matrices.row_stride[i] = pitch_;
    }
    return matrices;
  }

  // In the grids' own memory, whose rows have room for the last bin.
  HalfSpectra grid_spectra() const {
    return half_spectra(
        {reinterpret_cast<float2*>(grids_.data), transformed_, grids_.columns, pitch_ / 2, grids_.count});
  }

  // Of a pass over a matrix.
  std::int64_t blocks() const { return ceil_div(columns_.samples, kColumnsPerBlock) * chunk_count_; }

  std::int64_t energy_parts() const {
    return own_ ? energy_count(call_.filter.spectra) : coarse_mask_blocks(grids_);
  }

  // Chunks [begin, end) of the rows, onto the coarse rows that they touch.
  void spread(const Matrices& matrices, std::int64_t begin, std::int64_t end) {
    chunks_.begin = begin;
    chunks_.end = end;
    if (call_.sum) {
      spread_sum({call_.sum->vectors, static_cast<float*>(matrices.data[0]), rows_, chunks_, columns_.samples,
                  centers_, partials_, sums_, blocks()},
                 call_.stream);
    } else {
      spread_rows({matrices, rows_, chunks_, columns_.samples, centers_, partials_}, call_.stream);
    }
    const Decimation& window = call_.filter.plan.rows;
    const std::int64_t height = rows_.samples;
    const std::int64_t first = first_cell(begin * chunks_.rows, height, window);
    const std::int64_t last = first_cell(std::min(end * chunks_.rows, height) - 1, height, window);
    const std::int64_t touched = std::min(last - first + rows_.taps, rows_.cells);
    spread_columns({grids_, rows_, columns_, chunks_, partials_, first, touched}, call_.stream);
  }

  void interpolate_grids(const Matrices& matrices, const AddLast& add) {
    const Plan& plan = call_.filter.plan;
    chunks_.begin = 0;
    chunks_.end = chunk_count_;
    const double at_zero = mask_gain(plan.mask, 0, 0) - plan.background;
    interpolate(
        {matrices, grids_, rows_, columns_, chunks_, centers_,
         static_cast<float>(call_.scale * plan.background), static_cast<float>(call_.scale * at_zero), add},
        call_.stream);
  }

  bool own_;  // the grids are filtered without cuFFT
  const WindowTables& rows_;
  const WindowTables& columns_;
  std::int64_t transformed_;   // rows of a grid, see coarse_bins.h
  std::int64_t pitch_;         // of the grids
  std::int64_t chunk_count_;   // of a matrix
  std::int64_t group_;         // matrices at a time
  std::int64_t panel_chunks_;  // chunks at a time
  RowChunks chunks_{};
  CoarseGrids grids_{};
  float* partials_ = nullptr;
  float* centers_ = nullptr;
  float* samples_ = nullptr;    // of a sum
  double* sums_ = nullptr;      // of |v_i|, and of squares, by block
  double* energies_ = nullptr;  // of a sum: what its mask finds
  void* work_ = nullptr;
};

}  // namespace

std::unique_ptr<Executor> decimated(const Call& call) { return std::make_unique<Decimated>(call); }

}  // namespace freemerge::cuda
