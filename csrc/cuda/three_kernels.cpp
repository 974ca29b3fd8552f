#include "cuda/three_kernels.h"

#include <algorithm>
#include <cmath>

#include "common/error.h"
#include "cuda/accumulate.cuh"
#include "cuda/column_filter.cuh"
#include "cuda/error.h"
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
    if (call_.sum) sums_ = arena.take<double>(kinds() * warps() + energy_count(call_.filter.spectra));
  }

  std::size_t work_bytes() const override { return 0; }
  std::size_t work_bound() const override { return 0; }

  void run_groups() override {
    for (std::int64_t begin = 0; begin < call_.count; begin += group_)
      run_group(slice(begin, std::min(group_, call_.count - begin)));
  }

  RowPass row_pass_of(const Matrices& matrices) const {
    HalfSpectra spectra = half_spectra({memory_, height_, width_, pitch_, matrices.count});
    for (int i = 0; in_place_ && i < matrices.count; ++i) {
      spectra.data[i] = static_cast<float*>(matrices.data[i]);
      spectra.pitch[i] = matrices.row_stride[i];
      spectra.last[i] = memory_ + i * height_;
    }
    return row_pass(call_.filter.spectra, matrices, spectra, call_.scale);
  }

  void run_group(const Matrices& matrices) {
    const RowPass rows = row_pass_of(matrices);
    if (call_.sum) return run_sum(rows);
    filter_spectra(call_.filter.spectra, rows, call_.stream);
    spectra_to_rows(rows, call_.stream);
  }

  // All but the last pass; what rows and columns put down for the squares that are left is side by side.
  void run_sum(RowPass rows) {
    const SumFirst& sum = *call_.sum;
    rows.vectors = sum.vectors;
    rows.sums = sums_;
    double* energies = sums_ + kinds() * warps();
    filter_spectra(call_.filter.spectra, rows, call_.stream, {energies, nullptr});
    finish_sum(sum, {sums_, warps()}, height_ * width_,
               {energies - warps(), warps() + energy_count(call_.filter.spectra)}, call_.stream);
  }

  void add_last(const AddLast& add) override {
    RowPass rows = row_pass_of(slice(0, 1));
    rows.add = add;
    spectra_to_rows(rows, call_.stream);
  }

  // Of the sums of each warp: see RowPass.
  std::int64_t kinds() const { return call_.sum->vectors.count + 2; }
  std::int64_t warps() const { return row_warps(height_, call_.filter.plan.tiles); }

  bool in_place_;
  std::int64_t height_;
  std::int64_t width_;
  std::int64_t pitch_;        // of the workspace
  std::int64_t group_;        // matrices at a time
  float2* memory_ = nullptr;  // spectra, or their last bins
  double* sums_ = nullptr;    // of a sum, by warp: those of its rows, then energies of its columns
};

// See RowTables: column_filter() transforms a block of columns unless all of their gains are constant.
std::vector<float> kept_shares(std::int64_t width, const Tiles& tiles, const std::vector<float>& gains) {
  std::vector<float> shares;
  for (auto first = gains.begin(); first != gains.end();) {
    const auto end = first + std::min<std::ptrdiff_t>(tiles.columns, gains.end() - first);
    const bool kept = std::none_of(first, end, [](float gain) { return std::isnan(gain); });
    for (; first != end; ++first) shares.push_back(kept ? *first * *first / static_cast<float>(width) : 0.0f);
  }
  return shares;
}

}  // namespace

SpectrumFilter spectrum_filter(const Mask& mask, const Tiles& tiles, const std::vector<float>& column_gains,
                               const Upload& upload) {
  return {mask, tiles,
          row_tables(mask.height, mask.width, tiles, kept_shares(mask.width, tiles, column_gains), upload),
          column_tables(mask, column_gains, tiles.parts, tiles.column_chirp, upload)};
}

RowPass row_pass(const SpectrumFilter& filter, const Matrices& matrices, const HalfSpectra& spectra,
                 double scale) {
  const Tiles& tiles = filter.tiles;
  // Columns keep their size, so that those of gain 1 stay as they are; twice the spectra come from the rows.
  const double factor = scale / (2.0 * static_cast<double>(filter.mask.width) * tiles.parts);
  RowPass rows{};
  rows.matrices = matrices;
  rows.spectra = spectra;
  rows.tables = filter.rows;
  rows.parts = tiles.parts;
  rows.threads = tiles.row_threads;
  rows.factor = static_cast<float>(factor);
  return rows;
}

void filter_spectra(const SpectrumFilter& filter, const RowPass& rows, cudaStream_t stream,
                    const Energies& energies) {
  const Tiles& tiles = filter.tiles;
  const ColumnBlocks blocks = column_blocks(filter.mask.height, tiles);
  ColumnFilter columns{rows.spectra, filter.mask, 1.0 / blocks.length, filter.columns, tiles.parts};
  columns.energies = energies;
  // Of twice the spectra, whose rows are combined.
  columns.energy_share = 1.0 / (4.0 * static_cast<double>(filter.mask.width) * tiles.parts);
  if (energies.sums) {  // blocks of columns of constant gain put nothing down
    const auto bytes = static_cast<std::size_t>(energy_count(filter)) * sizeof(double);
    check(cudaMemsetAsync(energies.sums, 0, bytes, stream), "cudaMemsetAsync");
  }
  rows_to_spectra(rows, stream);
  column_filter(columns, blocks, stream);
}

std::int64_t energy_count(const SpectrumFilter& filter) {
  return column_warps(filter.mask.width / 2 + 1, filter.tiles.parts,
                      column_blocks(filter.mask.height, filter.tiles));
}

std::unique_ptr<Executor> three_kernels(const Call& call) { return std::make_unique<ThreeKernels>(call); }

}  // namespace freemerge::cuda
