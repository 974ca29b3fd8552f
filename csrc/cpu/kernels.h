// The inner loops, one table per instruction set. Everything else (threads, buffers, plans, masks) is
// compiled once for all of them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/accumulate_kernels.h"
#include "cpu/decimated_job.h"
#include "cpu/features.h"
#include "cpu/fft.h"
#include "cpu/line_fft.h"
#include "cpu/radial_table.h"
#include "cpu/select_kernels.h"
#include "cpu/spectrum.h"

namespace freemerge {

// Of a block of columns of the released code's mask: distances below disc lie in the disc, those from
// ring_begin to ring_end on the ring.
struct OfficialLanes {
  std::int32_t disc[kMaxLanes] = {}, ring_begin[kMaxLanes] = {}, ring_end[kMaxLanes] = {};
};

// T is the arithmetic type: float, or double for float64 storage.
template <typename T>
struct TransformKernels {
  int lanes;

  // In place: plan.n elements of `data`, plan.work elements of `work` (an element is 2 * lanes reals, see
  // fft.h; aligned to 64 bytes). The spectrum is in slots.
  void (*forward)(const Fft<T>& plan, T* data, T* work);
  void (*inverse)(const Fft<T>& plan, T* data, T* work);

  // Filters column block `block` of the spectrum along its signals, in place. `scratch` holds
  // plan.padded_size() + plan.work elements.
  void (*column_filter)(const Fft<T>& plan, const Spectrum<T>& spectrum, std::int64_t block,
                        const BlockGains<T>& gains, T* scratch, Upcoming next);
  // Multiplies it by one number; a gain of 0 clears NaN and infinity too.
  void (*scale_block)(const Spectrum<T>& spectrum, std::int64_t block, T gain);

  // Gains of a block of columns; see step_gains.inl.
  void (*step_gains)(const std::int32_t* inner, const std::int32_t* outer, const T* gains, std::int64_t rows,
                     T* out);
  void (*official_gains)(const OfficialLanes& own, const OfficialLanes& mirror, std::int64_t signals,
                         std::int64_t rows, T factor, T offset, T* out);
};

// Storage is the type in memory, T the type of its arithmetic.
template <typename Storage, typename T>
struct SignalKernels {
  // Real transforms of group `group` of the signals into the spectrum. The signals may lie where the spectrum
  // goes. `scratch` holds plan.padded_size() + plan.work elements.
  void (*forward_rows)(const Fft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                       std::int64_t group, T* scratch, Upcoming next);
  // And back: signal = background * signal + factor * (unscaled inverse). The signals are not read when
  // background is 0.
  void (*inverse_rows)(const Fft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                       std::int64_t group, T background, T factor, T* scratch, Upcoming next);
  // The same for rows that have a plan of lines: two at a time. `scratch` holds plan.work() reals.
  void (*forward_lines)(const LineFft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                        std::int64_t group, T* scratch, Upcoming next);
  void (*inverse_lines)(const LineFft<T>& plan, const Signals<Storage>& signals, const Spectrum<T>& spectrum,
                        std::int64_t group, T background, T factor, T* scratch, Upcoming next);
};

struct Kernels {
  // Gains of a smooth mask; see radial.inl.
  void (*radial_gains)(const RadialCells& cells, const float* column_squared, const float* row_squared,
                       std::int64_t rows, float factor, float offset, float* out);
  DecimatedKernels decimated;
  TransformKernels<float> single_precision;
  TransformKernels<double> double_precision;
  SignalKernels<float, float> float32;
  SignalKernels<double, double> float64;
  SignalKernels<freemerge::bfloat16, float> bfloat16;
  SignalKernels<freemerge::float16, float> float16;
  AccumulateRange* accumulate_range;
  AddRoundRange* add_round_range;
  ElectRange* elect_range;
  DecideRange* decide_range;
  SquareSumRange* square_sum_range;
  CollectRange* collect_range;
  CountRange* count_range;
};

// Throws std::invalid_argument if this build or this processor lacks them.
const Kernels& kernels(Isa isa);

// Those of active_isa().
const Kernels& active_kernels();

// Kernels of one type.
inline const TransformKernels<float>& transform_kernels(const Kernels& k, float) {
  return k.single_precision;
}
inline const TransformKernels<double>& transform_kernels(const Kernels& k, double) {
  return k.double_precision;
}
inline const auto& signal_kernels(const Kernels& k, float) { return k.float32; }
inline const auto& signal_kernels(const Kernels& k, double) { return k.float64; }
inline const auto& signal_kernels(const Kernels& k, freemerge::bfloat16) { return k.bfloat16; }
inline const auto& signal_kernels(const Kernels& k, freemerge::float16) { return k.float16; }

}  // namespace freemerge
