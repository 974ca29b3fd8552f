#include "bindings/cuda_bindings.h"
#include "bindings/sparse_updates.h"
#include "cuda/select.cuh"
#include "cuda/sparse.cuh"

namespace freemerge::cuda {

namespace py = pybind11;

void bind_experts(py::module_& m) {
  m.def("select_scratch", &select_scratch, py::arg("rows"), py::arg("columns"));
  m.def(
      "select",
      [](Address model, int model_dtype, Address base, int base_dtype, std::int64_t rows,
         std::int64_t columns, std::int64_t k, Address indices, Address values, Address counts,
         Address scratch, int device, Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          select({array(model, model_dtype, rows * columns), array(base, base_dtype, rows * columns), rows,
                  columns, k, pointer<std::int64_t>(indices), pointer<float>(values),
                  pointer<std::int64_t>(counts)},
                 pointer<void>(scratch), s);
        });
      },
      py::arg("model"), py::arg("model_dtype"), py::arg("base"), py::arg("base_dtype"), py::arg("rows"),
      py::arg("columns"), py::arg("k"), py::arg("indices"), py::arg("values"), py::arg("counts"),
      py::arg("scratch"), py::arg("device"), py::arg("stream"));
  py::class_<SparseSwitch>(m, "SparseSwitch", py::module_local())
      .def(
          py::init([](const std::vector<UpdateTuple>& updates) { return SparseSwitch(updates_of(updates)); }),
          py::arg("updates"))
      .def_property_readonly("saved_bytes", &SparseSwitch::saved_bytes)
      .def_property_readonly("launches", &SparseSwitch::launches)
      .def(
          "apply",
          [](const SparseSwitch& self, Address saved, int device, Address stream) {
            on_stream(device, stream, [&](cudaStream_t s) { self.apply(pointer<void>(saved), s); });
          },
          py::arg("saved"), py::arg("device"), py::arg("stream"))
      .def(
          "restore",
          [](const SparseSwitch& self, Address saved, int device, Address stream) {
            on_stream(device, stream, [&](cudaStream_t s) { self.restore(pointer<void>(saved), s); });
          },
          py::arg("saved"), py::arg("device"), py::arg("stream"));
}

}  // namespace freemerge::cuda
