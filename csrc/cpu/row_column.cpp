#include "cpu/row_column.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/error.h"
#include "cpu/buffer.h"
#include "cpu/mask_columns.h"
#include "cpu/parallel.h"

namespace freemerge {
namespace {

template <typename Storage>
using ArithmeticOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Everything about a filter but the matrix: one object serves all matrices of a call.
template <typename Storage>
class RowColumnFilter {
 public:
  using T = ArithmeticOf<Storage>;

  RowColumnFilter(const Mask& mask, bool transposed, double background, double scale, bool in_place,
                  std::int64_t row_stride, const Kernels& kernels)
      : transforms_(transform_kernels(kernels, T{})),
        signals_(signal_kernels(kernels, Storage{})),
        mask_(mask_columns_for<T>(mask, transposed, kernels)),
        transposed_(transposed),
        background_(background),
        scale_(scale),
        in_place_(in_place),
        row_stride_(row_stride),
        first_(shared_fft<T>(mask_->length())),
        second_(shared_fft<T>(mask_->signals())) {
    keep_columns();
  }

  // Whether some column's gain is the background throughout, but for the rounding of a gain.
  bool prunes() const {
    for (std::int64_t column = 0; column <= mask_->length() / 2; ++column) {
      const std::optional<double> gain = mask_->constant(column);
      if (gain && std::abs(*gain - background_) <= 1e-6) return true;
    }
    return false;
  }

  // Blocks of the longest loop over one matrix.
  std::int64_t parallel_blocks() const { return std::max(spectrum_.groups(), spectrum_.blocks()); }

  // Work areas of one worker, and the spectrum of one matrix where it does not fit in place.
  struct Scratch {
    Buffer<T> batch, gains, edge;
  };
  Scratch scratch() const {
    const std::int64_t element = 2 * transforms_.lanes;
    const std::int64_t elements =
        std::max(first_->loose_size() + first_->work, second_->loose_size() + second_->work);
    return {Buffer<T>(elements * element), Buffer<T>(mask_->rows() * transforms_.lanes),
            Buffer<T>(3 * mask_->signals() + mask_->rows() * transforms_.lanes)};
  }
  Buffer<T> spectrum_memory() const {
    return in_place_ ? Buffer<T>() : Buffer<T>(spectrum_.width * spectrum_.signals);
  }

  // Filters one matrix with the first `workers` elements of `scratch`.
  void run(Storage* matrix, T* spectrum_data, Scratch* scratch, int workers) const {
    const Signals<Storage> signals{matrix, mask_->signals(), mask_->length(), row_stride_, transposed_};
    Spectrum<T> spectrum = spectrum_;
    if constexpr (std::is_same_v<Storage, T>) {
      spectrum.data = in_place_ ? matrix : spectrum_data;
    } else {
      spectrum.data = spectrum_data;
    }
    const T background = static_cast<T>(scale_ * background_);
    const T factor = static_cast<T>(scale_ * 0.5 / static_cast<double>(mask_->length()));
    if (spectrum.columns > 0) {
      parallel_for(spectrum.groups(), workers, [&](std::int64_t group, int worker) {
        signals_.analyse(*first_, signals, spectrum, group, scratch[worker].batch.data());
      });
      parallel_for(spectrum.blocks(), workers,
                   [&](std::int64_t block, int worker) { filter_block(spectrum, block, scratch[worker]); });
    }
    parallel_for(spectrum.groups(), workers, [&](std::int64_t group, int worker) {
      signals_.synthesise(*first_, signals, spectrum, group, background, factor,
                          scratch[worker].batch.data());
    });
  }

 private:
  std::int64_t slot(std::int64_t bin) const { return first_->loose_slot(bin); }

  // Keeps the columns that differ from the background somewhere; the edge goes last.
  void keep_columns() {
    const std::int64_t length = mask_->length();
    const auto needed = [&](std::int64_t column) { return mask_->constant(column) != background_; };
    const auto keep = [&](std::int64_t column, std::int64_t low, std::int64_t high) {
      columns_.push_back(static_cast<std::int32_t>(column));
      low_.push_back(static_cast<std::int32_t>(low));
      high_.push_back(static_cast<std::int32_t>(high));
    };
    for (std::int64_t column = 1; 2 * column < length; ++column) {
      if (needed(column)) keep(column, slot(column), slot(length - column));
    }
    dc_ = needed(0);
    nyquist_ = length % 2 == 0 && needed(length / 2);
    if (dc_ || nyquist_) {
      keep(dc_ ? 0 : length / 2, dc_ ? slot(0) : -1, nyquist_ ? slot(length / 2) : -1);
    }

    const auto count = static_cast<std::int64_t>(columns_.size());
    spectrum_.signals = mask_->signals();
    spectrum_.columns = count;
    spectrum_.width = 2 * count - (dc_ && !nyquist_ ? 1 : 0);
    spectrum_.lanes = transforms_.lanes;
    spectrum_.low = low_.data();
    spectrum_.high = high_.data();
    spectrum_.edge = dc_ || nyquist_;
    spectrum_.complete = dc_ && spectrum_.width == length;
    spectrum_.pitch = in_place_ ? row_stride_ : spectrum_.width;
    spectrum_.tiled = !in_place_ || row_stride_ == length;
  }

  // The gain of all columns of a block if it is one number.
  std::optional<double> block_constant(std::int64_t block) const {
    const std::int64_t begin = block * spectrum_.lanes, end = begin + spectrum_.columns_in(block);
    const std::optional<double> gain = mask_->constant(columns_[static_cast<std::size_t>(begin)]);
    for (std::int64_t i = begin + 1; i < end; ++i) {
      if (mask_->constant(columns_[static_cast<std::size_t>(i)]) != gain) return std::nullopt;
    }
    if (spectrum_.edge && nyquist_ && end == spectrum_.columns &&
        mask_->constant(mask_->length() / 2) != gain) {
      return std::nullopt;
    }
    return gain;
  }

  void filter_block(const Spectrum<T>& spectrum, std::int64_t block, const Scratch& scratch) const {
    if (const std::optional<double> gain = block_constant(block)) {
      const T correction = static_cast<T>(*gain - background_);
      if (correction != T{1}) transforms_.scale_block(spectrum, block, correction);
      return;
    }
    const int lanes = spectrum.lanes;
    const int count = static_cast<int>(spectrum.columns_in(block));
    const double factor = 1.0 / static_cast<double>(mask_->signals());
    T* const gains = scratch.gains.data();
    mask_->fill(columns_.data() + block * lanes, count, lanes, background_, factor, gains);
    T* const edge_work = scratch.edge.data();
    BlockGains<T> block_gains{gains, mask_->mirrored(), nullptr, edge_work};
    if (dc_ && nyquist_ && block == spectrum.blocks() - 1) {
      block_gains.edge_difference = split_edge(count - 1, factor, gains, edge_work + 2 * mask_->signals());
    }
    transforms_.filter_block(*second_, spectrum, block, block_gains, scratch.batch.data());
  }

  // See BlockGains: `gains` has those of DC in lane `lane`; they become the mean of DC's and Nyquist's.
  const T* split_edge(int lane, double factor, T* gains, T* work) const {
    const std::int64_t signals = mask_->signals(), rows = mask_->rows(), lanes = transforms_.lanes;
    const auto nyquist_column = static_cast<std::int32_t>(mask_->length() / 2);
    T *const difference = work, *const nyquist = work + signals;
    mask_->fill(&nyquist_column, 1, transforms_.lanes, background_, factor, nyquist);
    for (std::int64_t row = 0; row < rows; ++row) {
      const T d = gains[row * lanes + lane], e = nyquist[row * lanes];
      gains[row * lanes + lane] = (d + e) / 2;
      difference[row] = (d - e) / 2;
      if (mask_->mirrored() && row > 0) difference[signals - row] = difference[row];
    }
    return difference;
  }

  const TransformKernels<T>& transforms_;
  const SignalKernels<Storage, T>& signals_;
  const std::shared_ptr<const MaskColumns<T>> mask_;
  const bool transposed_;
  const double background_, scale_;
  const bool in_place_;
  const std::int64_t row_stride_;
  const std::shared_ptr<const Fft<T>> first_, second_;
  std::vector<std::int32_t> columns_, low_, high_;
  bool dc_ = false, nyquist_ = false;
  Spectrum<T> spectrum_{};
};

template <typename Storage>
void filter_all(const RowColumnFilter<Storage>& filter, const Matrices& matrices, int threads) {
  using T = ArithmeticOf<Storage>;
  const auto count = static_cast<std::int64_t>(matrices.data.size());
  // Whole matrices per worker where there are enough of them: no waiting, and each stays in one core's cache.
  const bool whole = count >= threads;
  const int workers = workers_for(whole ? count : filter.parallel_blocks(), threads);
  std::vector<typename RowColumnFilter<Storage>::Scratch> scratch;
  std::vector<Buffer<T>> spectra;
  for (int worker = 0; worker < workers; ++worker) {
    scratch.push_back(filter.scratch());
    if (whole || worker == 0) spectra.push_back(filter.spectrum_memory());
  }
  const auto matrix = [&](std::int64_t i) {
    return static_cast<Storage*>(matrices.data[static_cast<std::size_t>(i)]);
  };
  if (whole) {
    parallel_for(count, workers, [&](std::int64_t i, int worker) {
      const auto index = static_cast<std::size_t>(worker);
      filter.run(matrix(i), spectra[index].data(), &scratch[index], 1);
    });
  } else {
    for (std::int64_t i = 0; i < count; ++i) {
      filter.run(matrix(i), spectra[0].data(), scratch.data(), workers);
    }
  }
}

void check(const Plan& plan, const Matrices& matrices, int threads) {
  require(plan.mask.height >= 1 && plan.mask.width >= 1, "mask: height and width must be at least 1");
  require(matrices.row_stride >= plan.mask.width, "row_stride must be at least the width");
  require(threads >= 1, "threads must be at least 1");
}

}  // namespace

void filter_full(const Plan& plan, const Matrices& matrices, double scale, int threads,
                 const Kernels& kernels) {
  check(plan, matrices, threads);
  visit_dtype(matrices.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    constexpr bool fits = std::is_same_v<Storage, ArithmeticOf<Storage>>;
    require(!plan.packed || (fits && !plan.transposed), "packed goes with float32 or float64 rows");
    filter_all(RowColumnFilter<Storage>(plan.mask, plan.transposed, 0.0, scale, plan.packed,
                                        matrices.row_stride, kernels),
               matrices, threads);
  });
}

void filter_pruned(const Plan& plan, const Matrices& matrices, double scale, int threads,
                   const Kernels& kernels) {
  check(plan, matrices, threads);
  visit_dtype(matrices.dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    const RowColumnFilter<Storage> filter(plan.mask, plan.transposed, plan.background, scale, false,
                                          matrices.row_stride, kernels);
    // Corrections to some other number would cancel most of background * X, and with it digits of the result.
    require(filter.prunes(), "background must be the gain of a whole column of the mask");
    filter_all(filter, matrices, threads);
  });
}

}  // namespace freemerge
