#include "cuda/bindings.h"
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
          select({array(model, model_dtype), array(base, base_dtype), rows, columns, k,
                  pointer<std::int64_t>(indices), pointer<float>(values), pointer<std::int64_t>(counts)},
                 pointer<void>(scratch), s);
        });
      },
      py::arg("model"), py::arg("model_dtype"), py::arg("base"), py::arg("base_dtype"), py::arg("rows"),
      py::arg("columns"), py::arg("k"), py::arg("indices"), py::arg("values"), py::arg("counts"),
      py::arg("scratch"), py::arg("device"), py::arg("stream"));
  m.def(
      "sparse_apply",
      [](Address weights, int dtype, Address indices, bool wide, std::int64_t count, Address values,
         double scale, Address origin, Address saved, int device, Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          sparse_apply(
              {array(weights, dtype), pointer<const void>(indices), wide, count, pointer<void>(saved)},
              pointer<const float>(values), static_cast<float>(scale), pointer<const void>(origin), s);
        });
      },
      py::arg("weights"), py::arg("dtype"), py::arg("indices"), py::arg("wide"), py::arg("count"),
      py::arg("values"), py::arg("scale"), py::arg("origin"), py::arg("saved"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "sparse_restore",
      [](Address weights, int dtype, Address indices, bool wide, std::int64_t count, Address saved,
         int device, Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          sparse_restore(
              {array(weights, dtype), pointer<const void>(indices), wide, count, pointer<void>(saved)}, s);
        });
      },
      py::arg("weights"), py::arg("dtype"), py::arg("indices"), py::arg("wide"), py::arg("count"),
      py::arg("saved"), py::arg("device"), py::arg("stream"));
}

}  // namespace freemerge::cuda
