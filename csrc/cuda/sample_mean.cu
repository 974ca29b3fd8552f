#include "cuda/kernel.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sample_mean.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_mean_kernel(SampleMean a) {
  double* scratch = shared_memory<double>();
  const T* matrix = static_cast<const T*>(a.matrices.data[blockIdx.x]);
  const int rows = sample_rows(a.height);
  const int columns = sample_columns(a.width);
  const std::int64_t row_step = a.height / rows * a.matrices.row_stride[blockIdx.x];
  const std::int64_t column_step = a.width / columns;
  double sum = 0.0;
  double squares = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) {
    const double value =
        static_cast<double>(widen(load(matrix + i / columns * row_step + i % columns * column_step)));
    sum += value;
    squares += value * value;
  }
  sum = block_sum(sum, scratch);
  __syncthreads();
  squares = block_sum(squares, scratch);
  if (threadIdx.x != 0) return;
  const double count = static_cast<double>(rows * columns);
  const double mean = sum / count;
  const double variance = squares / count - mean * mean;
  // Also 0 where an entry isn't finite: every comparison with NaN fails, and so does infinity < infinity.
  const bool dominant = mean * mean > variance && mean * mean < 1e300;
  store(a.means + blockIdx.x, dominant ? static_cast<float>(mean) : 0.0f);
}

}  // namespace

void sample_mean(const SampleMean& arguments, cudaStream_t stream) {
  const Launch how("sample_mean", dim3(static_cast<unsigned>(arguments.matrices.count)), dim3(kThreads),
                   kThreads / kWarpSize * sizeof(double), stream);
  visit_storage(arguments.matrices.dtype,
                [&](auto tag) { launch(sample_mean_kernel<typename decltype(tag)::type>, how, arguments); });
}

}  // namespace freemerge::cuda
