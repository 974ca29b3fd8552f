// The table of the instruction set FREEMERGE_ISA, and all of its kernels that work on vectors by hand.
#include "cpu/decimated.inl"
#include "cpu/kernels.h"
#include "cpu/line_rows.inl"
#include "cpu/radial.inl"
#include "cpu/step_gains.inl"

namespace freemerge::FREEMERGE_ISA {

// In accumulate_kernels.cpp and select_kernels.cpp.
AccumulateRange accumulate_range;
AddRoundRange add_round_range;
ElectRange elect_range;
DecideRange decide_range;
SquareSumRange square_sum_range;
CollectRange collect_range;
CountRange count_range;

template <typename T>
void forward_kernel(const Fft<T>& plan, T* data, T* work) {
  forward(plan, data, work);
}
template <typename T>
void inverse_kernel(const Fft<T>& plan, T* data, T* work) {
  inverse(plan, data, work);
}

template <typename T>
constexpr TransformKernels<T> transform_table() {
  return {kLanes<T>,      forward_kernel<T>, inverse_kernel<T>, column_filter<T>,
          scale_block<T>, step_gains<T>,     official_gains<T>};
}

template <typename Storage>
constexpr SignalKernels<Storage, Arithmetic<Storage>> signal_table() {
  using T = Arithmetic<Storage>;
  return {forward_rows<Storage, T>, inverse_rows<Storage, T>, forward_lines<Storage, T>,
          inverse_lines<Storage, T>};
}

extern const Kernels kKernels;
const Kernels kKernels = {radial_gains,
                          kDecimatedKernels,
                          transform_table<float>(),
                          transform_table<double>(),
                          signal_table<float>(),
                          signal_table<double>(),
                          signal_table<bfloat16>(),
                          signal_table<float16>(),
                          accumulate_range,
                          add_round_range,
                          elect_range,
                          decide_range,
                          square_sum_range,
                          collect_range,
                          count_range};

}  // namespace freemerge::FREEMERGE_ISA
