#include <pybind11/stl.h>

#include "bindings/cuda_bindings.h"
#include "cuda/cufft_api.h"
#include "cuda/fft.h"

namespace freemerge::cuda {
namespace {

namespace py = pybind11;

void raise(const Error& error) {
  const py::object type = py::module_::import("freemerge.errors").attr("CudaError");
  const py::object instance = type(error.what());
  instance.attr("operation") = error.operation;
  instance.attr("code") = error.code;
  instance.attr("file") = error.file;
  instance.attr("line") = error.line;
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void bind_device(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    }
  });
  // Those that the kernels are compiled for, as CMake names them.
  m.attr("ARCHITECTURES") = FREEMERGE_CUDA_ARCHITECTURES;
  m.def("device_count", [] {
    return without_gil([] {
      int count = 0;
      check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
      return count;
    });
  });
  m.def(
      "open_cufft",
      [](const std::vector<std::string>& paths) {
        int version = 0;
        without_gil([&] {
          cufft::open(paths);
          check_cufft(cufft::api().GetVersion(&version), "cufftGetVersion");
        });
        return py::make_tuple(cufft::location(), version);
      },
      py::arg("paths"));
  m.def("clear_fft_cache", [] { without_gil(clear_fft_cache); });
  m.def("fft_cache_size", &fft_cache_size);
}

}  // namespace freemerge::cuda
