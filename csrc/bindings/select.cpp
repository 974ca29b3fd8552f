#include "cpu/select.h"

#include "bindings/arrays.h"
#include "bindings/bindings.h"

namespace freemerge {
namespace {

TaskVector task_vector(std::uintptr_t model, int model_dtype, std::uintptr_t base, int base_dtype,
                       std::int64_t n) {
  return {{memory<const void>(model, n), to_dtype(model_dtype)},
          {memory<const void>(base, n), to_dtype(base_dtype)}};
}

}  // namespace

void bind_select(pybind11::module_& m) {
  m.def(
      "select_largest",
      [](std::uintptr_t model, int model_dtype, std::uintptr_t base, int base_dtype, std::int64_t rows,
         std::int64_t width, std::int64_t k, int threads) {
        const TaskVector v = task_vector(model, model_dtype, base, base_dtype, rows * width);
        return arrays(without_gil([&] {
          return rows == 1 ? select_largest(v, width, k, threads)
                           : select_largest_per_row(v, rows, width, k, threads);
        }));
      },
      pybind11::arg("model"), pybind11::arg("model_dtype"), pybind11::arg("base"),
      pybind11::arg("base_dtype"), pybind11::arg("rows"), pybind11::arg("width"), pybind11::arg("k"),
      pybind11::arg("threads"));
  m.def(
      "count_magnitudes",
      [](std::uintptr_t model, int model_dtype, std::uintptr_t base, int base_dtype, std::int64_t n,
         int shift, int bits, std::uint32_t above, std::uintptr_t counts, int threads) {
        // Without a base the entries of `model` themselves count.
        const TaskVector v{{memory<const void>(model, n), to_dtype(model_dtype)},
                           {pointer<const void>(base), to_dtype(base_dtype)}};
        const pybind11::gil_scoped_release release;
        count_magnitudes(v, n, {shift, bits, above}, memory<std::int64_t>(counts, 1), threads);
      },
      pybind11::arg("model"), pybind11::arg("model_dtype"), pybind11::arg("base"),
      pybind11::arg("base_dtype"), pybind11::arg("n"), pybind11::arg("shift"), pybind11::arg("bits"),
      pybind11::arg("above"), pybind11::arg("counts"), pybind11::arg("threads"));
  m.def(
      "select_from_bin",
      [](std::uintptr_t model, int model_dtype, std::uintptr_t base, int base_dtype, std::int64_t n,
         int lowest, int threads) {
        const TaskVector v = task_vector(model, model_dtype, base, base_dtype, n);
        return arrays(without_gil([&] { return select_from_bin(v, n, lowest, threads); }));
      },
      pybind11::arg("model"), pybind11::arg("model_dtype"), pybind11::arg("base"),
      pybind11::arg("base_dtype"), pybind11::arg("n"), pybind11::arg("lowest"), pybind11::arg("threads"));
  m.attr("LEADING_BITS") = kLeadingBits.bits;
}

}  // namespace freemerge
