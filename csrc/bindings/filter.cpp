#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/bindings.h"
#include "bindings/mask.h"
#include "common/error.h"
#include "common/plan.h"
#include "cpu/decimated.h"
#include "cpu/row_column.h"

namespace freemerge {
namespace {

namespace py = pybind11;

void filter(const std::vector<std::uintptr_t>& pointers, int dtype, const Plan& plan, std::int64_t row_stride,
            double scale, int threads, const std::optional<std::string>& isa) {
  require(dtype >= 0 && dtype <= static_cast<int>(DType::kFloat16), "dtype must be between 0 and 3");
  Matrices matrices{{}, static_cast<DType>(dtype), row_stride};
  for (const std::uintptr_t pointer : pointers) {
    require(pointer != 0, "pointers must not be null");
    matrices.data.push_back(reinterpret_cast<void*>(pointer));
  }
  const Kernels& table = kernels(isa ? isa_from_name(*isa) : active_isa());
  switch (plan.form) {
    case Form::kDecimated:
      return filter_decimated(plan, matrices, scale, threads, table);
    case Form::kPruned:
      return filter_pruned(plan, matrices, scale, threads, table);
    case Form::kFull:
      return filter_full(plan, matrices, scale, threads, table);
    case Form::kScale:
      break;
  }
  throw std::invalid_argument("form must be decimated, pruned or full");
}

// Gains on the half spectrum, H x (W / 2 + 1).
py::array_t<double> mask_gains(const py::object& params) {
  const Mask mask = to_mask(params, nullptr);
  py::array_t<double> gains({mask.height, mask.width / 2 + 1});
  auto values = gains.mutable_unchecked<2>();
  for (std::int64_t y = 0; y < values.shape(0); ++y) {
    for (std::int64_t x = 0; x < values.shape(1); ++x) values(y, x) = mask_gain(mask, y, x);
  }
  return gains;
}

Plan make_plan(int form, const py::object& mask, std::uintptr_t table, bool transposed, bool packed,
               double background, const Decimation& rows, const Decimation& columns) {
  require(form >= 0 && form <= static_cast<int>(Form::kFull), "form must be between 0 and 3");
  return {static_cast<Form>(form),
          to_mask(mask, reinterpret_cast<const float*>(table)),
          transposed,
          packed,
          background,
          rows,
          columns};
}

}  // namespace

void bind_filter(py::module_& m) {
  py::dict kinds;
  for (const MaskName& kind : kMaskNames) kinds[kind.name] = static_cast<int>(kind.kind);
  m.attr("MASK_KINDS") = kinds;
  m.def("mask_gains", &mask_gains, py::arg("mask"));
  py::class_<Decimation>(m, "Decimation")
      .def(py::init([](std::int64_t cells, int taps, std::int64_t band, bool nyquist) {
             return Decimation{cells, taps, band, nyquist};
           }),
           py::kw_only(), py::arg("cells"), py::arg("taps"), py::arg("band"), py::arg("nyquist") = false);
  py::class_<Plan>(m, "Plan").def(py::init(&make_plan), py::kw_only(), py::arg("form"), py::arg("mask"),
                                  py::arg("table") = 0, py::arg("transposed") = false,
                                  py::arg("packed") = false, py::arg("background") = 0.0,
                                  py::arg("rows") = Decimation{}, py::arg("columns") = Decimation{});
  m.def("filter", &filter, py::call_guard<py::gil_scoped_release>(), py::arg("pointers"), py::arg("dtype"),
        py::arg("plan"), py::arg("row_stride"), py::arg("scale"), py::arg("threads"),
        py::arg("isa") = py::none());
}

}  // namespace freemerge
