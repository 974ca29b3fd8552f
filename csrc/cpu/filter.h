// A prepared filter: everything that does not depend on the data, made once; run as often as wanted.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "common/plan.h"
#include "cpu/kernels.h"

namespace freemerge {

class Filter {
 public:
  virtual ~Filter() = default;

  // In place, every matrix X, whose rows are its row stride of elements apart, becomes scale * Re IFFT2(M *
  // FFT2(X)). Several threads may run one filter at the same time; results do not depend on `threads`. Throws
  // std::invalid_argument or std::bad_alloc before anything is written. `means`, if there are any, are what
  // is taken out of each matrix on the way, and whose share is added to its result: a filter of small numbers
  // is more accurate. The decimated form of float32 alone has them.
  void run(const std::vector<void*>& matrices, const std::vector<std::int64_t>& row_strides, double scale,
           int threads, const std::vector<float>& means = {}) const;

  // Bytes of the tables that are kept between runs.
  virtual std::int64_t nbytes() const = 0;

 protected:
  struct Call {
    std::int64_t row_stride;
    double scale;
    float mean;
  };

  explicit Filter(const Mask& mask);

 private:
  // Bytes of the spectrum of one matrix, and of the work area of each worker on it.
  virtual std::int64_t spectrum_bytes() const = 0;
  virtual std::int64_t work_bytes() const = 0;
  // Blocks of the longest loop over one matrix: more workers than that have nothing to do.
  virtual std::int64_t blocks_of_matrix() const = 0;
  virtual bool takes_means() const { return false; }
  virtual void filter_matrix(void* matrix, const Call& call, void* spectrum, void* const* work,
                             int workers) const = 0;

  const std::int64_t width_;
};

// `column_gains` is for the pruned and full forms: the gain of each column of the half spectrum (of each row
// of the other half, if transposed) that has one gain throughout, NaN for the others. A mask's table is read
// here, not later. Throws std::invalid_argument for what the form cannot do.
std::unique_ptr<Filter> make_filter(const Plan& plan, DType dtype, std::vector<double> column_gains,
                                    const Kernels& kernels);

}  // namespace freemerge
