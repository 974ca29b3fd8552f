#include "cuda/three_kernels.h"

#include <algorithm>

#include "common/error.h"
#include "cuda/accumulate.cuh"
#include "cuda/column_filter.cuh"
#include "cuda/executor.h"
#include "cuda/heuristics.h"
#include "cuda/launch_math.h"

namespace freemerge::cuda {
namespace {

using heuristics::kBinsPerSector;

// Spectra of float32 matrices take the matrices' own memory, and only their last bins the workspace.
class ThreeKernels : public Executor {
 public:
  explicit ThreeKernels(const Call& call)
      : Executor(call),
        in_place_(call.filter.dtype == DType::kFloat32),
        height_(call.filter.plan.mask.height),
        width_(call.filter.plan.mask.width),
        pitch_(in_place_ ? 1 : kBinsPerSector * ceil_div(width_ / 2 + 1, kBinsPerSector)) {
    group_ = fit(heuristics::kBatchBytes, 8 * (width_ / 2 + 1) * height_, 1,
                 std::min<std::int64_t>(heuristics::kMatricesPerLaunch, call.count));
  }

 private:
  void place(Arena& arena) override {
    memory_ = arena.take<float2>(group_ * height_ * pitch_);
    if (call_.sum) sums_ = arena.take<double>(sum_count(call_.filter.spectra, *call_.sum));
  }

  std::size_t work_bytes() const override { return 0; }
  std::size_t work_bound() const override { return 0; }

  void run_groups() override {
    for (std::int64_t begin = 0; begin < call_.count; begin += group_)
      run_group(slice(begin, std::min(group_, call_.count - begin)));
  }

  void run_group(const Matrices& matrices) {
    HalfSpectra spectra = half_spectra({memory_, height_, width_, pitch_, matrices.count});
    for (int i = 0; in_place_ && i < matrices.count; ++i) {
      spectra.data[i] = static_cast<float*>(matrices.data[i]);
      spectra.pitch[i] = matrices.row_stride[i];
      spectra.last[i] = memory_ + i * height_;
    }
    filter_spectra(call_.filter.spectra, matrices, spectra, call_.scale, call_.stream, call_.sum, sums_);
  }

  bool in_place_;
  std::int64_t height_;
  std::int64_t width_;
  std::int64_t pitch_;        // of the workspace
  std::int64_t group_;        // matrices at a time
  float2* memory_ = nullptr;  // spectra, or their last bins
  double* sums_ = nullptr;    // of a sum, by warp
};

}  // namespace

SpectrumFilter spectrum_filter(const Mask& mask, const Tiles& tiles, const std::vector<float>& column_gains,
                               const Upload& upload) {
  return {mask, tiles, row_tables(mask.height, mask.width, tiles, upload),
          column_tables(mask, column_gains, tiles.parts, tiles.column_chirp, upload)};
}

void filter_spectra(const SpectrumFilter& filter, const Matrices& matrices, const HalfSpectra& spectra,
                    double scale, cudaStream_t stream, const SumFirst* sum, double* sums) {
  const Mask& mask = filter.mask;
  const Tiles& tiles = filter.tiles;
  const ColumnBlocks blocks = column_blocks(mask.height, tiles);
  // Columns keep their size, so that those of gain 1 stay as they are; twice the spectra come from the rows.
  const double column_factor = 1.0 / blocks.length;
  const double row_factor = scale / (2.0 * static_cast<double>(mask.width) * tiles.parts);
  const RowPass rows{matrices,
                     spectra,
                     filter.rows,
                     tiles.parts,
                     tiles.row_threads,
                     static_cast<float>(row_factor),
                     sum ? sum->vectors : TaskVectors{},
                     sums};
  rows_to_spectra(rows, stream);
  column_filter({spectra, mask, column_factor, filter.columns, tiles.parts}, blocks, stream);
  spectra_to_rows(rows, stream);
  if (!sum) return;
  const std::int64_t warps = row_warps(mask.height, tiles);
  finish_sum(*sum, {sums, warps}, mask.height * mask.width, {sums + (sum->vectors.count + 1) * warps, warps},
             stream);
}

std::int64_t sum_count(const SpectrumFilter& filter, const SumFirst& sum) {
  return (sum.vectors.count + 2) * row_warps(filter.mask.height, filter.tiles);
}

std::unique_ptr<Executor> three_kernels(const Call& call) { return std::make_unique<ThreeKernels>(call); }

}  // namespace freemerge::cuda
