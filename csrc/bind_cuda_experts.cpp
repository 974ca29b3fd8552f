#include "cuda/bindings.h"
#include "cuda/select.cuh"
#include "cuda/sparse.cuh"

namespace freemerge::cuda {

namespace py = pybind11;

void bind_experts(py::module_& m) {
  m.def("select_scratch", &select_scratch, py::arg("rows"), py::arg("columns"));
  m.def(
      "select",
      [](Address values, int dtype, std::int64_t rows, std::int64_t columns, std::int64_t k, Address indices,
         Address kept, Address scratch, int device, Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          select({array(values, dtype), rows, columns, k, pointer<std::int64_t>(indices), pointer<float>(kept)},
                 pointer<void>(scratch), s);
        });
      },
      py::arg("values"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("k"), py::arg("indices"),
      py::arg("kept"), py::arg("scratch"), py::arg("device"), py::arg("stream"));
  m.def(
      "sparse_apply",
      [](Address weights, int weights_dtype, Address indices, Address values, int values_dtype, std::int64_t count,
         float scale, bool replace, Address saved, int device, Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          sparse_apply({array(weights, weights_dtype), pointer<const std::int64_t>(indices),
                        array(values, values_dtype), count, scale, replace, pointer<void>(saved)},
                       s);
        });
      },
      py::arg("weights"), py::arg("weights_dtype"), py::arg("indices"), py::arg("values"), py::arg("values_dtype"),
      py::arg("count"), py::arg("scale"), py::arg("replace"), py::arg("saved"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "sparse_undo",
      [](Address weights, int weights_dtype, Address indices, std::int64_t count, Address saved, int device,
         Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          sparse_undo({array(weights, weights_dtype), pointer<const std::int64_t>(indices), {}, count, 1.0f, false,
                       pointer<void>(saved)},
                      s);
        });
      },
      py::arg("weights"), py::arg("weights_dtype"), py::arg("indices"), py::arg("count"), py::arg("saved"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace freemerge::cuda
