// One call of a filter: how its matrices go through the kernels, and in what memory.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/fft.h"
#include "cuda/filter.h"
#include "cuda/matrices.h"
#include "cuda/workspace.h"

namespace freemerge::cuda {

struct Call {
  const Filter& filter;
  const MatrixList& matrices;  // may be empty where only sizes are asked for
  std::int64_t count;          // of matrices
  double scale;
  cudaStream_t stream;
  int device;
  bool capturing;
  const SumFirst* sum;  // or null
};

// Made for one call by decimated(), full() or three_kernels().
class Executor {
 public:
  explicit Executor(const Call& call) : call_(call) {}
  virtual ~Executor() = default;

  // Bytes of workspace for these matrices.
  std::size_t bytes() { return buffer_bytes() + work_bytes(); }

  // The same for as many matrices, wherever they are.
  std::size_t bound() { return buffer_bytes() + work_bound(); }

  // `workspace` has bytes() bytes.
  void run(void* workspace) {
    Arena arena(workspace);
    place(arena);
    run_groups();
  }

  // The last pass of a sum: see Filter::run_last(). `workspace` is as run() has left it.
  void run_last(void* workspace, const AddLast& add) {
    Arena arena(workspace);
    place(arena);
    add_last(add);
  }

 protected:
  using FftKeys = std::vector<FftKey>;

  virtual void place(Arena& arena) = 0;        // sets the addresses of all buffers
  virtual std::size_t work_bytes() const = 0;  // of the transforms
  virtual std::size_t work_bound() const = 0;
  virtual void run_groups() = 0;
  virtual void add_last(const AddLast&) {}  // for those that form a sum

  Matrices slice(std::int64_t begin, std::int64_t count) const {
    Matrices matrices{};
    matrices.count = static_cast<int>(count);
    matrices.dtype = call_.filter.dtype;
    const auto offset = static_cast<std::ptrdiff_t>(begin);
    std::copy_n(call_.matrices.data.begin() + offset, count, matrices.data);
    std::copy_n(call_.matrices.row_strides.begin() + offset, count, matrices.row_stride);
    return matrices;
  }

  const Fft& fft(FftKey key, std::int64_t batch) const {
    key.batch = batch;
    return cached_fft(key, call_.capturing);
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
    return std::max(limit, fft_work(keys, 1));
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

  const Call& call_;

 private:
  std::size_t buffer_bytes() {
    Arena arena(nullptr);
    place(arena);
    return arena.used();
  }
};

std::unique_ptr<Executor> decimated(const Call& call);
std::unique_ptr<Executor> full(const Call& call);           // rows, or whole matrices, by cuFFT
std::unique_ptr<Executor> three_kernels(const Call& call);  // full, with kernels of our own

}  // namespace freemerge::cuda
