#include <pybind11/stl.h>

#include <optional>

#include "bindings/bindings.h"
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

Mask make_mask(int kind, std::int64_t height, std::int64_t width, double unit_y, double unit_x, double edge0,
               double edge1, double gain0, double gain1, double gain2, double order, int axis,
               std::uintptr_t table) {
  require(kind >= 0 && kind <= static_cast<int>(MaskKind::kTable), "kind must be between 0 and 5");
  require(height >= 1 && width >= 1, "height and width must be at least 1");
  require((kind == static_cast<int>(MaskKind::kTable)) == (table != 0),
          "table goes with kind 5, and only with it");
  return {static_cast<MaskKind>(kind),
          height,
          width,
          unit_y,
          unit_x,
          edge0,
          edge1,
          gain0,
          gain1,
          gain2,
          order,
          axis,
          reinterpret_cast<const float*>(table)};
}

Plan make_plan(int form, const Mask& mask, bool transposed, bool packed, double background,
               const Decimation& rows, const Decimation& columns) {
  require(form >= 0 && form <= static_cast<int>(Form::kFull), "form must be between 0 and 3");
  return {static_cast<Form>(form), mask, transposed, packed, background, rows, columns};
}

}  // namespace

void bind_filter(py::module_& m) {
  py::class_<Mask>(m, "Mask")
      .def(py::init(&make_mask), py::kw_only(), py::arg("kind"), py::arg("height"), py::arg("width"),
           py::arg("unit_y") = 1.0, py::arg("unit_x") = 1.0, py::arg("edge0") = 0.0, py::arg("edge1") = 0.0,
           py::arg("gain0") = 0.0, py::arg("gain1") = 0.0, py::arg("gain2") = 0.0, py::arg("order") = 1.0,
           py::arg("axis") = 1, py::arg("table") = 0)
      .def("gain", [](const Mask& mask, std::int64_t bin_y, std::int64_t bin_x) {
        require(bin_y >= 0 && bin_y < mask.height && bin_x >= 0 && bin_x <= mask.width / 2,
                "bin_y must be in [0, height), bin_x in [0, width // 2]");
        return mask_gain(mask, bin_y, bin_x);
      });
  py::class_<Decimation>(m, "Decimation")
      .def(py::init([](std::int64_t cells, int taps, std::int64_t band, bool nyquist) {
             return Decimation{cells, taps, band, nyquist};
           }),
           py::kw_only(), py::arg("cells"), py::arg("taps"), py::arg("band"), py::arg("nyquist") = false);
  py::class_<Plan>(m, "Plan").def(py::init(&make_plan), py::kw_only(), py::arg("form"), py::arg("mask"),
                                  py::arg("transposed") = false, py::arg("packed") = false,
                                  py::arg("background") = 0.0, py::arg("rows") = Decimation{},
                                  py::arg("columns") = Decimation{});
  m.def("filter", &filter, py::call_guard<py::gil_scoped_release>(), py::arg("pointers"), py::arg("dtype"),
        py::arg("plan"), py::arg("row_stride"), py::arg("scale"), py::arg("threads"),
        py::arg("isa") = py::none());
}

}  // namespace freemerge
