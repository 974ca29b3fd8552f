#include "cpu/accumulate.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "common/error.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace freemerge {
namespace {

// Entries whose |v| are summed together; fixes the order of the sums.
constexpr std::int64_t kBlock = 1 << 15;

// visit(block, begin, count)
template <typename Visit>
void for_blocks(std::int64_t n, int threads, const Visit& visit) {
  for_blocks(n, kBlock, threads, visit);
}

}  // namespace

Accumulated accumulate(void* out, Storage base, const std::vector<Storage>& models,
                       const std::vector<double>& weights, bool squares, std::int64_t n, int threads) {
  require(n >= 0, "n must not be negative");
  require(!models.empty(), "models must not be empty");
  require(out != nullptr || !squares, "out must not be null where its squares are wanted");
  require(out == nullptr || weights.size() == models.size(), "weights must hold one number per model");
  const bool wide = base.dtype == DType::kFloat64 ||
                    std::any_of(models.begin(), models.end(),
                                [](const Storage& model) { return model.dtype == DType::kFloat64; });
  const int count = static_cast<int>(models.size());
  const AccumulateJob job{out,  wide ? DType::kFloat64 : DType::kFloat32, base, models.data(), weights.data(),
                          count};
  std::vector<double> sums(static_cast<std::size_t>(blocks_in(n, kBlock)) * models.size());
  std::vector<double> block_squares(squares ? static_cast<std::size_t>(blocks_in(n, kBlock)) : 0);
  const Kernels& k = active_kernels();
  for_blocks(n, threads, [&](std::int64_t block, std::int64_t begin, std::int64_t entries) {
    k.accumulate_range(job, begin, entries, sums.data() + block * count,
                       squares ? &block_squares[static_cast<std::size_t>(block)] : nullptr);
  });
  std::vector<double> means(models.size(), 0.0);
  for (std::size_t i = 0; i < sums.size(); ++i) means[i % models.size()] += sums[i];
  for (double& mean : means) mean = n == 0 ? 0.0 : mean / static_cast<double>(n);
  return {means, std::accumulate(block_squares.begin(), block_squares.end(), 0.0)};
}

bool add_round(void* out, DType out_dtype, Storage base, Storage delta, double scale, double factor,
               std::int64_t n, int threads) {
  require(n >= 0, "n must not be negative");
  const bool wide = base.dtype == DType::kFloat64 || delta.dtype == DType::kFloat64;
  const AddRoundJob job{out, out_dtype, wide ? DType::kFloat64 : DType::kFloat32, base, delta, scale, factor};
  const Kernels& k = active_kernels();
  std::atomic<bool> finite{true};
  for_blocks(n, threads, [&](std::int64_t, std::int64_t begin, std::int64_t entries) {
    if (!k.add_round_range(job, begin, entries)) finite = false;
  });
  return finite;
}

void elect(const Election& election, Storage delta, double weight, Magnitudes range, std::int64_t n,
           int threads) {
  require(n >= 0, "n must not be negative");
  require(delta.dtype == DType::kFloat32 || delta.dtype == DType::kFloat64, "delta must be float or double");
  const ElectJob job{election, delta, weight, range};
  const Kernels& k = active_kernels();
  for_blocks(n, threads, [&](std::int64_t, std::int64_t begin, std::int64_t entries) {
    k.elect_range(job, begin, entries);
  });
}

void decide(const Election& election, DType dtype, std::int64_t n, int threads) {
  require(n >= 0, "n must not be negative");
  require(dtype == DType::kFloat32 || dtype == DType::kFloat64, "sums must be float or double");
  const Kernels& k = active_kernels();
  for_blocks(n, threads, [&](std::int64_t, std::int64_t begin, std::int64_t entries) {
    k.decide_range(election, dtype, begin, entries);
  });
}

double square_sum(Storage x, std::int64_t n, int threads) {
  require(n >= 0, "n must not be negative");
  std::vector<double> sums(static_cast<std::size_t>(blocks_in(n, kBlock)));
  const Kernels& k = active_kernels();
  for_blocks(n, threads, [&](std::int64_t block, std::int64_t begin, std::int64_t entries) {
    sums[static_cast<std::size_t>(block)] = k.square_sum_range(x, begin, entries);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace freemerge
