#include "cpu/full.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/bytes.h"
#include "common/error.h"
#include "cpu/mask_columns.h"
#include "cpu/parallel.h"

namespace freemerge {
namespace {

template <typename Storage>
using ArithmeticOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Gains of smaller masks are kept: they would cost as much as the transforms.
constexpr std::int64_t kMostKeptBins = 1 << 14;

template <typename Storage>
class FullFilter : public Filter {
 public:
  using T = ArithmeticOf<Storage>;

  FullFilter(const Plan& plan, std::vector<double> column_gains, const Kernels& kernels)
      : Filter(plan.mask),
        transforms_(transform_kernels(kernels, T{})),
        signals_(signal_kernels(kernels, Storage{})),
        mask_(plan.mask, plan.transposed, kernels),
        column_gains_(std::move(column_gains)),
        transposed_(plan.transposed),
        packed_(plan.packed),
        background_(plan.form == Form::kPruned ? plan.background : 0.0),
        lines_(transposed_ ? nullptr : LineFft<T>::make(mask_.length(), transforms_.lanes)),
        first_(lines_ ? nullptr : std::make_shared<const Fft<T>>(mask_.length())),
        second_(first_ && mask_.signals() == mask_.length()
                    ? first_
                    : std::make_shared<const Fft<T>>(mask_.signals())) {
    require(static_cast<std::int64_t>(column_gains_.size()) == mask_.length() / 2 + 1,
            "column_gains must hold one gain for each column of the half spectrum");
    // Corrections to some other number would cancel most of background * X, and with it digits of the result.
    require(plan.form == Form::kFull ||
                std::find(column_gains_.begin(), column_gains_.end(), background_) != column_gains_.end(),
            "background must be the gain of a whole column of the mask");
    choose_columns();
    if (mask_.length() * mask_.signals() <= kMostKeptBins) keep_gains();
  }

  std::int64_t nbytes() const override {
    return mask_.nbytes() + vector_bytes(column_gains_, columns_, low_, high_, kept_, kept_memory_) +
           (lines_ ? lines_->nbytes() : first_->nbytes()) + (second_ == first_ ? 0 : second_->nbytes());
  }

 private:
  // In units of T: a batch of signals, what the edge sets aside, gains of all lanes, and those of a block
  // with the edge.
  std::int64_t batch_size() const {
    const auto batch = [&](const Fft<T>& plan) {
      return 2 * transforms_.lanes * (plan.padded_size() + plan.work);
    };
    return std::max(batch(*second_), lines_ ? lines_->work(packed_) : batch(*first_));
  }
  std::int64_t edge_size() const { return 2 * mask_.signals(); }
  std::int64_t table_size() const { return mask_.rows() * transforms_.lanes; }
  std::int64_t gains_size() const { return 2 * table_size() + mask_.signals(); }

  std::int64_t work_bytes() const override {
    return (batch_size() + edge_size() + gains_size()) * static_cast<std::int64_t>(sizeof(T));
  }
  std::int64_t spectrum_bytes() const override {
    return packed_ ? 0 : spectrum_.width * spectrum_.signals * static_cast<std::int64_t>(sizeof(T));
  }
  std::int64_t blocks_of_matrix() const override { return std::max(spectrum_.groups(), spectrum_.blocks()); }

  void filter_matrix(void* matrix, const Call& call, void* spectrum_memory, void* const* work,
                     int workers) const override {
    const Signals<Storage> signals{static_cast<Storage*>(matrix), mask_.signals(), mask_.length(),
                                   call.row_stride, transposed_};
    Spectrum<T> spectrum = spectrum_;
    spectrum.data = static_cast<T*>(packed_ ? matrix : spectrum_memory);
    spectrum.pitch = packed_ ? call.row_stride : spectrum_.width;
    spectrum.tiled = !packed_ || call.row_stride == mask_.length();
    const T background = static_cast<T>(call.scale * background_);
    const T factor = static_cast<T>(call.scale * 0.5 / static_cast<double>(mask_.length()));
    const auto work_of = [&](int worker) { return static_cast<T*>(work[worker]); };
    // What this worker reads after item `item`, as far as one can tell.
    const bool far = spectrum.signals * spectrum.width * static_cast<std::int64_t>(sizeof(T)) > kNearBytes;
    const auto after = [&](std::int64_t item, std::int64_t items, auto upcoming) {
      return far && item + workers < items ? upcoming(item + workers) : Upcoming{};
    };
    const std::int64_t groups = spectrum.groups(), blocks = spectrum.blocks();
    if (spectrum.columns > 0) {
      parallel_for(groups, workers, [&](std::int64_t group, int worker) {
        const Upcoming next = after(group, groups, [&](std::int64_t other) {
          return signals.upcoming(other * spectrum.group_size(), spectrum.signals_in(other));
        });
        if (lines_ != nullptr) {
          signals_.forward_lines(*lines_, signals, spectrum, group, work_of(worker), next);
        } else {
          signals_.forward_rows(*first_, signals, spectrum, group, work_of(worker), next);
        }
      });
      parallel_for(blocks, workers, [&](std::int64_t block, int worker) {
        const Upcoming next =
            after(block, blocks, [&](std::int64_t other) { return spectrum.upcoming_block(other); });
        filter_columns(spectrum, block, work_of(worker), next);
      });
    }
    parallel_for(groups, workers, [&](std::int64_t group, int worker) {
      const Upcoming next =
          after(group, groups, [&](std::int64_t other) { return spectrum.upcoming_group(other); });
      if (lines_ != nullptr) {
        signals_.inverse_lines(*lines_, signals, spectrum, group, background, factor, work_of(worker), next);
      } else {
        signals_.inverse_rows(*first_, signals, spectrum, group, background, factor, work_of(worker), next);
      }
    });
  }

  std::int64_t slot(std::int64_t bin) const { return lines_ ? bin : first_->padded_slot(bin); }
  double column_gain(std::int64_t column) const { return column_gains_[static_cast<std::size_t>(column)]; }

  // Takes the columns that differ from the background somewhere; the edge goes last.
  void choose_columns() {
    const std::int64_t length = mask_.length();
    const auto needed = [&](std::int64_t column) { return column_gain(column) != background_; };
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
    spectrum_.signals = mask_.signals();
    spectrum_.columns = count;
    spectrum_.width = 2 * count - (dc_ && !nyquist_ ? 1 : 0);
    spectrum_.lanes = transforms_.lanes;
    spectrum_.low = low_.data();
    spectrum_.high = high_.data();
    spectrum_.edge = dc_ || nyquist_;
    spectrum_.complete = dc_ && spectrum_.width == length;
  }

  // The gain of all columns of a block if it is one number, else NaN.
  double constant_gain(std::int64_t block) const {
    constexpr double kVaries = std::numeric_limits<double>::quiet_NaN();
    const std::int64_t begin = block * spectrum_.lanes, end = begin + spectrum_.columns_in(block);
    const double gain = column_gain(columns_[static_cast<std::size_t>(begin)]);
    for (std::int64_t i = begin + 1; i < end; ++i) {
      if (column_gain(columns_[static_cast<std::size_t>(i)]) != gain) return kVaries;
    }
    const bool with_nyquist = nyquist_ && end == spectrum_.columns;
    return with_nyquist && column_gain(mask_.length() / 2) != gain ? kVaries : gain;
  }

  void filter_columns(const Spectrum<T>& spectrum, std::int64_t block, T* work, Upcoming next) const {
    if (const double gain = constant_gain(block); !std::isnan(gain)) {
      const T correction = static_cast<T>(gain - background_);
      if (correction != T{1}) transforms_.scale_block(spectrum, block, correction);
      return;
    }
    T *const edge_work = work + batch_size(), *const memory = edge_work + edge_size();
    BlockGains<T> gains = kept_.empty() ? block_gains(block, memory) : kept_[static_cast<std::size_t>(block)];
    gains.edge_work = edge_work;
    transforms_.column_filter(*second_, spectrum, block, gains, work, next);
  }

  // The gains of a block of columns, in `memory` of gains_size().
  BlockGains<T> block_gains(std::int64_t block, T* memory) const {
    const int lanes = transforms_.lanes, count = static_cast<int>(spectrum_.columns_in(block));
    const double factor = 1.0 / static_cast<double>(mask_.signals());
    const auto fill = [&](const std::int32_t* columns, int n, T* gains) {
      mask_.fill(columns, n, lanes, background_, factor, gains);
    };
    fill(columns_.data() + block * lanes, count, memory);
    if (!dc_ || !nyquist_ || block != spectrum_.blocks() - 1)
      return {memory, mask_.mirrored(), nullptr, nullptr};
    // See BlockGains: the edge has the gains of DC, which become the mean of DC's and Nyquist's.
    const std::int64_t signals = mask_.signals();
    T *const edge = memory + count - 1, *const nyquist = memory + table_size();
    T* const difference = nyquist + table_size();
    const auto nyquist_column = static_cast<std::int32_t>(mask_.length() / 2);
    fill(&nyquist_column, 1, nyquist);
    for (std::int64_t row = 0; row < mask_.rows(); ++row) {
      const T d = edge[row * lanes], e = nyquist[row * lanes];
      edge[row * lanes] = (d + e) / 2;
      difference[row] = (d - e) / 2;
      if (mask_.mirrored() && row > 0) difference[signals - row] = difference[row];
    }
    return {memory, mask_.mirrored(), difference, nullptr};
  }

  void keep_gains() {
    kept_memory_.resize(static_cast<std::size_t>(spectrum_.blocks() * gains_size()));
    for (std::int64_t block = 0; block < spectrum_.blocks(); ++block)
      kept_.push_back(block_gains(block, kept_memory_.data() + block * gains_size()));
  }

  const TransformKernels<T>& transforms_;
  const SignalKernels<Storage, T>& signals_;
  const MaskColumns<T> mask_;
  const std::vector<double> column_gains_;
  const bool transposed_, packed_;
  const double background_;
  const std::shared_ptr<const LineFft<T>> lines_;  // null where rows are transformed in batches
  const std::shared_ptr<const Fft<T>> first_, second_;
  std::vector<std::int32_t> columns_, low_, high_;
  bool dc_ = false, nyquist_ = false;
  Spectrum<T> spectrum_{};  // of any matrix: its memory is left out
  std::vector<T> kept_memory_;
  std::vector<BlockGains<T>> kept_;  // of every block, or none
};

}  // namespace

std::unique_ptr<Filter> make_full_filter(const Plan& plan, DType dtype, std::vector<double> column_gains,
                                         const Kernels& kernels) {
  return visit_dtype(dtype, [&](auto tag) -> std::unique_ptr<Filter> {
    using Storage = typename decltype(tag)::type;
    constexpr bool fits = std::is_same_v<Storage, ArithmeticOf<Storage>>;
    require(!plan.packed || (plan.form == Form::kFull && fits && !plan.transposed),
            "packed goes with the full form of float32 or float64 rows");
    return std::make_unique<FullFilter<Storage>>(plan, std::move(column_gains), kernels);
  });
}

}  // namespace freemerge
