#include "cpu/filter.h"

#include <algorithm>
#include <utility>

#include "common/error.h"
#include "cpu/buffer.h"
#include "cpu/decimated.h"
#include "cpu/full.h"
#include "cpu/parallel.h"

namespace freemerge {

Filter::Filter(const Mask& mask) : width_(mask.width) {
  require(mask.height >= 1 && mask.width >= 1, "mask: height and width must be at least 1");
}

void Filter::run(const std::vector<void*>& matrices, const std::vector<std::int64_t>& row_strides,
                 double scale, int threads, const std::vector<float>& means) const {
  require(row_strides.size() == matrices.size(), "row_strides must hold one number per matrix");
  require(std::all_of(row_strides.begin(), row_strides.end(), [this](auto n) { return n >= width_; }),
          "row_strides must be at least the width");
  require(threads >= 1, "threads must be at least 1");
  require(means.empty() || (takes_means() && means.size() == matrices.size()),
          "means must hold one number per matrix, and go with the decimated form of float32");
  const auto count = static_cast<std::int64_t>(matrices.size());
  // Whole matrices per worker where there are enough of them: no waiting, and each stays in one core's cache.
  const bool whole = count >= threads;
  const int workers = workers_for(whole ? count : blocks_of_matrix(), threads);
  std::vector<Buffer<char>> memory;
  const auto take = [&](std::int64_t bytes, int times) {
    std::vector<void*> areas;
    for (int i = 0; i < times; ++i) areas.push_back(memory.emplace_back(bytes).data());
    return areas;
  };
  const std::vector<void*> work = take(work_bytes(), workers);
  const std::vector<void*> spectra = take(spectrum_bytes(), whole ? workers : 1);
  const auto filter_one = [&](std::size_t i, void* spectrum, void* const* areas, int helpers) {
    filter_matrix(matrices[i], {row_strides[i], scale, means.empty() ? 0.0f : means[i]}, spectrum, areas,
                  helpers);
  };
  if (!whole) {
    for (std::size_t i = 0; i < matrices.size(); ++i) filter_one(i, spectra[0], work.data(), workers);
    return;
  }
  parallel_for(count, workers, [&](std::int64_t i, int worker) {
    const auto own = static_cast<std::size_t>(worker);
    filter_one(static_cast<std::size_t>(i), spectra[own], &work[own], 1);
  });
}

std::unique_ptr<Filter> make_filter(const Plan& plan, DType dtype, std::vector<double> column_gains,
                                    const Kernels& kernels) {
  if (plan.form == Form::kDecimated) return make_decimated_filter(plan, dtype, kernels.decimated);
  return make_full_filter(plan, dtype, std::move(column_gains), kernels);
}

}  // namespace freemerge
