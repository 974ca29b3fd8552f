#include "cuda/filter.h"

#include <algorithm>
#include <memory>

#include "common/error.h"
#include "cuda/coarse_filter.h"
#include "cuda/error.h"
#include "cuda/executor.h"
#include "cuda/heuristics.h"

namespace freemerge::cuda {
namespace {

Call call_of(const Filter& filter, const MatrixList& matrices, double scale, cudaStream_t stream,
             const SumFirst* sum) {
  require(matrices.data.size() == matrices.row_strides.size(), "row_strides must hold one number per matrix");
  if (sum) {
    require((filter.plan.form == Form::kDecimated || filter.plan.tiles.parts > 0) &&
                filter.dtype == DType::kFloat32,
            "only a filter of float32 whose first pass is ours forms its matrix there");
    require(matrices.data.size() == 1 && matrices.row_strides[0] == filter.plan.mask.width,
            "a sum is one matrix, whose rows lie end to end");
    require(scale == 1.0, "a sum is not scaled before its base is added");
    require(sum->vectors.count > 0 && sum->vectors.count <= kModelsPerLaunch,
            "1 to 16 models fit one launch");
  }
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const auto count = static_cast<std::int64_t>(matrices.data.size());
  return {filter, matrices, count, scale, stream, device, is_capturing(stream), sum};
}

std::unique_ptr<Executor> executor(const Call& call) {
  const Plan& plan = call.filter.plan;
  if (plan.form == Form::kDecimated) return decimated(call);
  return plan.tiles.parts > 0 ? three_kernels(call) : full(call);
}

}  // namespace

Filter::Filter(const Plan& plan_, DType dtype_, const std::vector<float>& column_gains, const Upload& upload)
    : plan(plan_), dtype(dtype_) {
  const Mask& mask = plan.mask;
  require(mask.height > 0 && mask.width > 0, "height and width must be positive");
  if (plan.form == Form::kDecimated) {
    require(!is_whole(plan.rows), "the rows axis must have a window");
    require(half_bin(plan.columns, mask.width) == 0,
            "real transforms along an odd width have no frequencies around Nyquist");
    rows = row_window(mask.height, plan.rows, upload);
    columns = column_window(mask.width, plan.columns, upload);
    if (plan.tiles.parts > 0) spectra = coarse_filter(plan, upload);
    return;
  }
  require(plan.form == Form::kFull, "the form must be decimated or full");
  if (plan.tiles.parts > 0) spectra = spectrum_filter(mask, plan.tiles, column_gains, upload);
  if (plan.fused) column_tables = cuda::column_tables(mask, column_gains, 1, 0, upload);
}

std::size_t Filter::workspace_bytes(const MatrixList& matrices, cudaStream_t stream,
                                    const SumFirst* sum) const {
  Call call = call_of(*this, matrices, 1.0, stream, sum);
  if (call.count > 0) return executor(call)->bytes();
  // Fewer matrices may need more: panels fill their budget differently.
  std::size_t most = 0;
  for (call.count = 1; call.count <= heuristics::kMatricesPerLaunch; ++call.count)
    most = std::max(most, executor(call)->bound());
  return most;
}

void Filter::run(const MatrixList& matrices, double scale, void* workspace, std::size_t bytes,
                 cudaStream_t stream, const SumFirst* sum) const {
  const Call call = call_of(*this, matrices, scale, stream, sum);
  const auto runner = executor(call);
  require(runner->bytes() <= bytes, "the workspace is too small");
  runner->run(workspace);
}

void Filter::run_last(const MatrixList& matrices, void* workspace, std::size_t bytes, cudaStream_t stream,
                      const SumFirst& sum, const AddLast& add) const {
  require(!add.out.data || adds(add), "base and out must be of a storage dtype and aligned");
  const Call call = call_of(*this, matrices, 1.0, stream, &sum);
  const auto runner = executor(call);
  require(runner->bytes() <= bytes, "the workspace is too small");
  runner->run_last(workspace, add);
}

bool Filter::adds(const AddLast& add) const {
  const auto taken = [&](const Array& array) {
    return array.dtype != DType::kFloat64 && in_quads(array, plan.mask.width);
  };
  return taken(add.out) && taken(add.base);
}

}  // namespace freemerge::cuda
