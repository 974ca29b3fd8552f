#include <algorithm>

#include "cuda/column_filter.cuh"
#include "cuda/executor.h"
#include "cuda/heuristics.h"
#include "cuda/launch_math.h"
#include "cuda/pack.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kBinsPerSector;

// Rows to half spectra, their columns through the mask, and back. cuFFT transforms the rows; or, unless the
// columns are fused, whole matrices.
class Full : public Executor {
 public:
  explicit Full(const Call& call) : Executor(call), fused_(call.filter.plan.fused) {
    const Mask& mask = call.filter.plan.mask;
    const std::int64_t pitch = kBinsPerSector * ceil_div(mask.width / 2 + 1, kBinsPerSector);
    spectra_ = {nullptr, mask.height, mask.width, pitch, 0};
    group_ = fit(heuristics::kBatchBytes, 8 * pitch * mask.height, 1,
                 std::min<std::int64_t>(heuristics::kMatricesPerLaunch, call.count));
    panel_rows_ = fit(heuristics::kPanelBytes, 8 * pitch, 1, group_ * mask.height);
  }

 private:
  // Rows that are equally far apart, of one matrix or of several that follow one another.
  struct Run {
    float* rows;  // null: they are packed where their spectra will be
    std::int64_t pitch;
    std::int64_t first;  // matrix of the group
    std::int64_t count;  // of rows
  };

  void place(Arena& arena) override {
    spectra_.data = arena.take<float2>(group_ * spectra_.height * spectra_.pitch);
    work_ = arena.rest();
  }

  std::size_t work_bytes() const override {
    std::size_t most = 0;
    in_groups([&](std::int64_t begin, std::int64_t count) {
      for_each_run(begin, count, [&](const Run& run) {
        in_panels(run, [&](std::int64_t, std::int64_t, std::int64_t transforms) {
          most = std::max(most, fft_work(keys(run.pitch), transforms));
        });
      });
    });
    return most;
  }

  std::size_t work_bound() const override { return fft_work_bound(keys(2 * spectra_.pitch), work_limit()); }

  void run_groups() override {
    in_groups([&](std::int64_t begin, std::int64_t count) { run_group(begin, count); });
  }

  FftKeys keys(std::int64_t pitch) const {
    const std::int64_t rows = fused_ ? 0 : spectra_.height;
    return {{call_.device, cufft::kR2C, rows, spectra_.width, 1, pitch, spectra_.pitch},
            {call_.device, cufft::kC2R, rows, spectra_.width, 1, pitch, spectra_.pitch}};
  }

  std::size_t work_limit() const {
    const auto spectra = static_cast<std::size_t>(2 * group_ * 8 * spectra_.pitch * spectra_.height);
    return fused_ ? std::min(heuristics::kWorkBytes, spectra) : spectra;
  }

  template <typename Visit>
  void in_groups(Visit visit) const {
    in_batches({}, call_.count, group_, 0, visit);
  }

  // Visits (first row, rows, transforms).
  template <typename Visit>
  void in_panels(const Run& run, Visit visit) const {
    const std::int64_t unit = fused_ ? 1 : spectra_.height;  // rows of a transform
    const std::int64_t step = std::max<std::int64_t>(panel_rows_ / unit, 1);
    in_batches(keys(run.pitch), run.count / unit, step, work_limit(),
               [&](std::int64_t begin, std::int64_t count) { visit(begin * unit, count * unit, count); });
  }

  // cuFFT reads and writes float matrices where they are, if every row is aligned to two floats.
  template <typename Visit>
  void for_each_run(std::int64_t begin, std::int64_t count, Visit visit) const {
    Run run{nullptr, 2 * spectra_.pitch, 0, 0};
    for (std::int64_t i = 0; i < count; ++i) {
      const auto matrix = static_cast<std::size_t>(begin + i);
      float* rows = static_cast<float*>(call_.matrices.data[matrix]);
      const std::int64_t stride = call_.matrices.row_strides[matrix];
      const bool aligned = reinterpret_cast<std::uintptr_t>(rows) % sizeof(float2) == 0 && stride % 2 == 0;
      const bool direct = call_.filter.dtype == DType::kFloat32 && aligned;
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
    for_each_run(begin, count, [&](const Run& run) { transform(run, begin, cufft::kR2C); });
    columns();
    for_each_run(begin, count, [&](const Run& run) { transform(run, begin, cufft::kC2R); });
  }

  void transform(const Run& run, std::int64_t begin, cufft::Type type) {
    const bool forward = type == cufft::kR2C;
    in_panels(run, [&](std::int64_t first, std::int64_t count, std::int64_t transforms) {
      float2* spectra = spectra_.data + (run.first * spectra_.height + first) * spectra_.pitch;
      float* reals = run.rows ? run.rows + first * run.pitch : reinterpret_cast<float*>(spectra);
      const FftKey key = keys(run.pitch)[forward ? 0 : 1];
      if (!run.rows && forward) pack(row_copy(run, begin, first, count), call_.stream);
      void* in = forward ? static_cast<void*>(reals) : spectra;
      void* out = forward ? static_cast<void*>(spectra) : reals;
      fft(key, transforms).execute(in, out, work_, call_.stream);
      if (!run.rows && !forward) unpack(row_copy(run, begin, first, count), call_.stream);
    });
  }

  RowCopy row_copy(const Run& run, std::int64_t begin, std::int64_t first, std::int64_t count) const {
    const std::int64_t height = spectra_.height;
    const std::int64_t first_matrix = run.first + first / height;
    const std::int64_t last_matrix = run.first + (first + count - 1) / height;
    return {
        slice(begin + first_matrix, last_matrix - first_matrix + 1),
        {spectra_.data + first_matrix * height * spectra_.pitch, height, spectra_.width, spectra_.pitch, 0},
        first % height,
        count};
  }

  void columns() {
    const Mask& mask = call_.filter.plan.mask;
    const double size = static_cast<double>(mask.height) * static_cast<double>(mask.width);
    const ColumnFilter filter(half_spectra(spectra_), mask, call_.scale / size, call_.filter.column_tables,
                              1);
    if (!fused_) return column_mask(filter, call_.stream);
    column_filter(filter, whole_columns(spectra_.height, spectra_.width / 2 + 1), call_.stream);
  }

  bool fused_;
  std::int64_t group_;       // matrices at a time
  std::int64_t panel_rows_;  // rows at a time
  Spectra spectra_{};
  void* work_ = nullptr;
};

}  // namespace

std::unique_ptr<Executor> full(const Call& call) { return std::make_unique<Full>(call); }

}  // namespace freemerge::cuda
