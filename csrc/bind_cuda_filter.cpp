#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cpu/window.h"
#include "cuda/bindings.h"
#include "cuda/filter.h"

namespace freemerge::cuda {
namespace {

namespace py = pybind11;

// `params` is a freemerge.responses.MaskParams.
Mask to_mask(const py::handle& params, Address table) {
  Mask mask;
  const int kind = params.attr("kind").cast<int>();
  require(kind >= 0 && kind <= static_cast<int>(MaskKind::kTable), "unknown mask kind");
  mask.kind = static_cast<MaskKind>(kind);
  mask.height = params.attr("height").cast<std::int64_t>();
  mask.width = params.attr("width").cast<std::int64_t>();
  mask.unit_y = params.attr("unit_y").cast<double>();
  mask.unit_x = params.attr("unit_x").cast<double>();
  mask.edge0 = params.attr("edge0").cast<double>();
  mask.edge1 = params.attr("edge1").cast<double>();
  mask.gain0 = params.attr("gain0").cast<double>();
  mask.gain1 = params.attr("gain1").cast<double>();
  mask.gain2 = params.attr("gain2").cast<double>();
  mask.order = params.attr("order").cast<double>();
  mask.axis = params.attr("axis").cast<int>();
  mask.table = pointer<const float>(table);
  require((mask.kind == MaskKind::kTable) == (mask.table != nullptr),
          "a table is for masks of that kind only");
  return mask;
}

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The tables of one axis, for upload: first, cell, weights (padded to the width of a kernel) and transform.
py::tuple window_tables(std::int64_t samples, const Decimation& decimation) {
  const auto window = window_for(samples, decimation);
  const int taps = decimation.taps;
  const int padded = padded_taps(taps);
  std::vector<std::int32_t> cell(static_cast<std::size_t>(samples));
  for (std::int64_t c = 0; c < decimation.cells; ++c) {
    for (std::int64_t n = window->first[static_cast<std::size_t>(c)];
         n < window->first[static_cast<std::size_t>(c + 1)]; ++n)
      cell[static_cast<std::size_t>(n)] = static_cast<std::int32_t>(c);
  }
  std::vector<float> weights(static_cast<std::size_t>(samples * padded), 0.0f);
  for (std::int64_t n = 0; n < samples; ++n) {
    for (int j = 0; j < taps; ++j)
      weights[static_cast<std::size_t>(n * padded + j)] =
          window->weights[static_cast<std::size_t>(n * taps + j)];
  }
  return py::make_tuple(to_numpy(window->first), to_numpy(cell), to_numpy(weights),
                        to_numpy(window->transform));
}

}  // namespace

void bind_filter(py::module_& m) {
  m.def(
      "window_tables",
      [](std::int64_t samples, std::int64_t cells, int taps, std::int64_t band, bool nyquist) {
        return window_tables(samples, {cells, taps, band, nyquist});
      },
      py::arg("samples"), py::arg("cells"), py::arg("taps"), py::arg("band"), py::arg("nyquist"));

  // Local to the module: its emulated twin registers the same types.
  py::class_<WindowTables>(m, "Window", py::module_local())
      .def(py::init([](std::int64_t samples, std::int64_t cells, int taps, std::int64_t band, bool nyquist,
                       Address first, Address cell, Address weights, Address transform) {
             return WindowTables{pointer<const std::int64_t>(first),
                                 pointer<const std::int32_t>(cell),
                                 pointer<const float>(weights),
                                 pointer<const double>(transform),
                                 samples,
                                 cells,
                                 band,
                                 taps,
                                 nyquist};
           }),
           py::arg("samples"), py::arg("cells"), py::arg("taps"), py::arg("band"), py::arg("nyquist"),
           py::arg("first"), py::arg("cell"), py::arg("weights"), py::arg("transform"));

  py::class_<FilterJob>(m, "Filter", py::module_local())
      .def_static(
          "decimated",
          [](const py::object& mask, int dtype, double background, const WindowTables& rows,
             const WindowTables& columns) {
            FilterJob job{};
            job.plan.form = Form::kDecimated;
            job.plan.mask = to_mask(mask, 0);
            job.plan.background = background;
            job.dtype = to_dtype(dtype);
            job.rows = rows;
            job.columns = columns;
            return job;
          },
          py::arg("mask"), py::arg("dtype"), py::arg("background"), py::arg("rows"), py::arg("columns"))
      .def_static(
          "by_columns",
          [](const py::object& mask, Address table, int dtype, double background, bool transposed,
             Address bins, Address place, std::int64_t column_count) {
            FilterJob job{};
            job.plan.form = Form::kPruned;
            job.plan.mask = to_mask(mask, table);
            job.plan.background = background;
            job.plan.transposed = transposed;
            job.dtype = to_dtype(dtype);
            job.bins = pointer<const std::int32_t>(bins);
            job.place = pointer<const std::int32_t>(place);
            job.column_count = column_count;
            return job;
          },
          py::arg("mask"), py::arg("table"), py::arg("dtype"), py::arg("background"), py::arg("transposed"),
          py::arg("bins"), py::arg("place"), py::arg("column_count"))
      .def(
          "workspace",
          [](FilterJob job, std::size_t count, int device, Address stream) {
            job.matrices.resize(count);
            job.row_strides.resize(count);
            return on_stream(device, stream, [&](cudaStream_t s) { return filter_workspace(job, s); });
          },
          py::arg("count"), py::arg("device"), py::arg("stream"))
      .def(
          "run",
          [](FilterJob job, const std::vector<Address>& matrices,
             const std::vector<std::int64_t>& row_strides, double scale, Address workspace,
             std::size_t workspace_bytes, int device, Address stream) {
            for (const Address matrix : matrices) job.matrices.push_back(pointer<void>(matrix));
            job.row_strides = row_strides;
            job.scale = scale;
            on_stream(device, stream,
                      [&](cudaStream_t s) { filter(job, pointer<void>(workspace), workspace_bytes, s); });
          },
          py::arg("matrices"), py::arg("row_strides"), py::arg("scale"), py::arg("workspace"),
          py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}

}  // namespace freemerge::cuda
