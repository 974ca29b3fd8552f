#include "cpu/filter.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/mask.h"
#include "bindings/plan.h"
#include "cpu/fft.h"

namespace freemerge {
namespace {

namespace py = pybind11;

using Gains = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Gains on the half spectrum, H x (W / 2 + 1).
Gains mask_gains(const py::object& params) {
  const Mask mask = to_mask(params, nullptr);
  Gains gains({mask.height, mask.width / 2 + 1});
  auto values = gains.mutable_unchecked<2>();
  without_gil([&] {
    for (std::int64_t y = 0; y < values.shape(0); ++y) {
      for (std::int64_t x = 0; x < values.shape(1); ++x) values(y, x) = mask_gain(mask, y, x);
    }
  });
  return gains;
}

std::unique_ptr<Filter> to_filter(const std::string& form, const py::object& mask, std::uintptr_t table,
                                  int dtype, bool transposed, bool packed, double background,
                                  const py::object& rows, const py::object& columns,
                                  const std::optional<Gains>& column_gains,
                                  const std::optional<std::string>& isa) {
  Plan plan;
  plan.form = named(kFormNames, form, "form").form;
  plan.mask = to_mask(mask, pointer<const float>(table));
  plan.transposed = transposed;
  plan.packed = packed;
  plan.background = background;
  plan.rows = to_decimation(rows);
  plan.columns = to_decimation(columns);
  std::vector<double> gains;
  if (column_gains) gains.assign(column_gains->data(), column_gains->data() + column_gains->size());
  const Kernels& chosen = isa ? kernels(isa_from_name(*isa)) : active_kernels();
  return without_gil([&] { return make_filter(plan, to_dtype(dtype), std::move(gains), chosen); });
}

void run(const Filter& self, const std::vector<std::uintptr_t>& pointers,
         const std::vector<std::int64_t>& row_strides, double scale, int threads,
         const std::vector<float>& means) {
  std::vector<void*> matrices;
  matrices.reserve(pointers.size());
  for (const std::uintptr_t address : pointers) {
    require(address != 0, "pointers must not be null");
    matrices.push_back(pointer<void>(address));
  }
  without_gil([&] { self.run(matrices, row_strides, scale, threads, means); });
}

// Whether a capsule of DLPack 1.0 or later has the flag of memory that is not to be written. See dlpack.h,
// DLManagedTensorVersioned.
bool is_read_only(const py::capsule& capsule) {
  struct Managed {
    std::uint32_t major, minor;
    void* context;
    void (*deleter)(Managed*);
    std::uint64_t flags;
  };
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) return false;
  const auto* managed =
      static_cast<const Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
  return managed->major >= 1 && (managed->flags & 1) != 0;
}

}  // namespace

void bind_filter(py::module_& m) {
  m.attr("MASK_KINDS") = codes(kMaskNames, &MaskName::kind);
  m.attr("FORMS") = codes(kFormNames, &FormName::form);
  py::list taps;
  for (int count = kMinTaps; count <= kMaxTaps; ++count) taps.append(count);
  m.attr("TAPS") = py::tuple(taps);
  m.attr("ROW_CELLS_MULTIPLE") = kRowCellsMultiple;
  m.attr("MAX_LANES") = kMaxLanes;
  m.def("has_transform", &has_transform, py::arg("n"));
  m.def("mask_gains", &mask_gains, py::arg("mask"));
  m.def("is_read_only", &is_read_only, py::arg("capsule"));
  py::class_<Filter>(m, "Filter")
      .def(py::init(&to_filter), py::kw_only(), py::arg("form"), py::arg("mask"), py::arg("table") = 0,
           py::arg("dtype"), py::arg("transposed") = false, py::arg("packed") = false,
           py::arg("background") = 0.0, py::arg("rows") = py::none(), py::arg("columns") = py::none(),
           py::arg("column_gains") = py::none(), py::arg("isa") = py::none())
      .def_property_readonly("nbytes", &Filter::nbytes)
      .def("run", &run, py::arg("pointers"), py::arg("row_strides"), py::arg("scale"), py::arg("threads"),
           py::arg("means") = std::vector<float>{});
}

}  // namespace freemerge
