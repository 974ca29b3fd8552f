#include <pybind11/stl.h>

#include "bindings/cuda_bindings.h"
#include "cuda/accumulate.cuh"

namespace freemerge::cuda {

namespace py = pybind11;

void bind_vectors(py::module_& m) {
  m.def("accumulate_scratch", &accumulate_scratch, py::arg("n"), py::arg("models"));
  m.def(
      "accumulate",
      [](Address out, Address base, int base_dtype, const std::vector<Address>& models,
         const std::vector<int>& model_dtypes, const std::vector<double>& weights, std::int64_t n,
         Address means, Address scratch, int device, Address stream) {
        require(models.size() == model_dtypes.size(), "model_dtypes must hold one dtype per model");
        std::vector<Array> sources;
        for (std::size_t i = 0; i < models.size(); ++i)
          sources.push_back(array(models[i], model_dtypes[i], n));
        on_stream(device, stream, [&](cudaStream_t s) {
          accumulate(pointer<float>(out), array(base, base_dtype, n), sources, weights, n,
                     pointer<double>(means), pointer<double>(scratch), s);
        });
      },
      py::arg("out"), py::arg("base"), py::arg("base_dtype"), py::arg("models"), py::arg("model_dtypes"),
      py::arg("weights"), py::arg("n"), py::arg("means"), py::arg("scratch"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "add_round",
      [](Address out, int out_dtype, Address base, int base_dtype, Address delta, int delta_dtype,
         double scale, double factor, std::int64_t n, int device, Address stream) {
        on_stream(device, stream, [&](cudaStream_t s) {
          add_round(array(out, out_dtype, n), array(base, base_dtype, n), array(delta, delta_dtype, n), scale,
                    factor, n, s);
        });
      },
      py::arg("out"), py::arg("out_dtype"), py::arg("base"), py::arg("base_dtype"), py::arg("delta"),
      py::arg("delta_dtype"), py::arg("scale"), py::arg("factor"), py::arg("n"), py::arg("device"),
      py::arg("stream"));
}

}  // namespace freemerge::cuda
