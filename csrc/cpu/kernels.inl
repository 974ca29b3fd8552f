// The table of one instruction set; see kernels.h. Each kernels_*.cpp includes this once.
#include "cpu/decimated.inl"
#include "cpu/kernels.h"
#include "cpu/radial.inl"
#include "cpu/row_column.inl"
#include "cpu/step_gains.inl"

namespace freemerge::FREEMERGE_ISA {

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
  return {kLanes<T>,      forward_kernel<T>, inverse_kernel<T>, filter_block<T>,
          scale_block<T>, step_gains<T>,     official_gains<T>};
}

template <typename Storage>
constexpr SignalKernels<Storage, Arithmetic<Storage>> signal_table() {
  return {analyse<Storage, Arithmetic<Storage>>, synthesise<Storage, Arithmetic<Storage>>};
}

extern const Kernels kKernels;
const Kernels kKernels = {
    radial_gains,          kDecimatedKernels,      transform_table<float>(), transform_table<double>(),
    signal_table<float>(), signal_table<double>(), signal_table<bfloat16>(), signal_table<float16>()};

}  // namespace freemerge::FREEMERGE_ISA
