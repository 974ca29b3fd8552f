#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/cuda_bindings.h"
#include "bindings/mask.h"
#include "common/window.h"
#include "cuda/column_filter.cuh"
#include "cuda/filter.h"

namespace freemerge::cuda {
namespace {

namespace py = pybind11;

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The tables of one axis, for upload: first, cell, weights, start, gathered and transform of WindowTables.
py::tuple window_tables(std::int64_t samples, const Decimation& decimation, int padded) {
  const Window window = make_window(samples, decimation);
  const int taps = decimation.taps;
  const std::int64_t cells = decimation.cells;
  const auto first = [&](std::int64_t cell) {  // cells below 0 are the last ones, a turn earlier
    const bool turn = cell < 0;
    return window.first[static_cast<std::size_t>(turn ? cell + cells : cell)] - (turn ? samples : 0);
  };
  std::int64_t reach = 0;
  for (std::int64_t c = 0; c < cells; ++c) reach = std::max(reach, first(c + 1) - first(c - taps + 1));
  std::vector<std::int32_t> cell(static_cast<std::size_t>(samples));
  std::vector<std::int32_t> start(static_cast<std::size_t>(cells));
  std::vector<float> weights(static_cast<std::size_t>(samples * padded), 0.0f);
  std::vector<float> gathered(static_cast<std::size_t>(reach * cells), 0.0f);
  for (std::int64_t c = 0; c < cells; ++c)
    start[static_cast<std::size_t>(c)] = static_cast<std::int32_t>(first(c - taps + 1));
  for (std::int64_t c = 0; c < cells; ++c) {
    for (std::int64_t n = first(c); n < first(c + 1); ++n) {
      cell[static_cast<std::size_t>(n)] = static_cast<std::int32_t>(c);
      for (int j = 0; j < taps; ++j) {
        const float weight = window.weights[static_cast<std::size_t>(n * taps + j)];
        weights[static_cast<std::size_t>(n * padded + j)] = weight;
        const std::int64_t target = c + j < cells ? c + j : c + j - cells;
        const std::int64_t turned = c + j < cells ? n : n - samples;
        const std::int64_t place = turned - start[static_cast<std::size_t>(target)];
        gathered[static_cast<std::size_t>(place * cells + target)] = weight;
      }
    }
  }
  return py::make_tuple(to_numpy(window.first), to_numpy(cell), to_numpy(weights), to_numpy(start),
                        to_numpy(gathered), to_numpy(window.transform));
}

// ColumnFilter::steps of a mask, as pairs: the boundaries fall from column to column.
py::array_t<std::int32_t> step_rows(const Mask& mask) {
  const std::int64_t bins = mask.width / 2 + 1;
  py::array_t<std::int32_t> rows({bins, std::int64_t{2}});
  auto values = rows.mutable_unchecked<2>();
  for (int step = 0; step < 2; ++step) {
    const double edge = step == 0 ? mask.edge0 : mask.edge1;
    std::int64_t count = mask.height / 2 + 1;
    for (std::int64_t bin = 0; bin < bins; ++bin) {
      const double fx = mask.unit_x * static_cast<double>(bin);
      const auto is_inside = [&](std::int64_t row) {
        const double fy = mask.unit_y * static_cast<double>(row);
        return is_below(fy * fy + fx * fx, edge);
      };
      while (count > 0 && !is_inside(count - 1)) --count;
      values(bin, step) = static_cast<std::int32_t>(count);
    }
  }
  return rows;
}

void set_matrices(FilterJob& job, const std::vector<Address>& matrices,
                  const std::vector<std::int64_t>& row_strides) {
  for (const Address matrix : matrices) job.matrices.push_back(pointer<void>(matrix));
  job.row_strides = row_strides;
}

}  // namespace

void bind_filter(py::module_& m) {
  m.def(
      "window_tables",
      [](std::int64_t samples, std::int64_t cells, int taps, std::int64_t band, bool nyquist, int padded) {
        require(padded >= taps && padded <= kMaxTaps, "padded must be at least taps and at most 12");
        return window_tables(samples, {cells, taps, band, nyquist}, padded);
      },
      py::arg("samples"), py::arg("cells"), py::arg("taps"), py::arg("band"), py::arg("nyquist"),
      py::arg("padded"));
  m.def(
      "step_rows", [](const py::object& mask) { return step_rows(to_mask(mask, nullptr)); }, py::arg("mask"));
  m.def("padded_taps", &padded_taps, py::arg("taps"));
  m.def(
      "column_filter_takes",
      [](std::int64_t height, int device, Address stream) {
        return on_stream(device, stream, [&](cudaStream_t) { return column_filter_takes(height); });
      },
      py::arg("height"), py::arg("device"), py::arg("stream"));

  // Local to the module: its emulated twin registers the same types.
  py::class_<WindowTables>(m, "Window", py::module_local())
      .def(py::init([](std::int64_t samples, std::int64_t cells, int taps, std::int64_t band, bool nyquist,
                       int padded, std::int64_t reach, Address first, Address cell, Address weights,
                       Address start, Address gathered, Address transform) {
             return WindowTables{pointer<const std::int64_t>(first),
                                 pointer<const std::int32_t>(cell),
                                 pointer<const float>(weights),
                                 pointer<const std::int32_t>(start),
                                 pointer<const float>(gathered),
                                 pointer<const double>(transform),
                                 samples,
                                 cells,
                                 band,
                                 reach,
                                 taps,
                                 padded,
                                 nyquist};
           }),
           py::arg("samples"), py::arg("cells"), py::arg("taps"), py::arg("band"), py::arg("nyquist"),
           py::arg("padded"), py::arg("reach"), py::arg("first"), py::arg("cell"), py::arg("weights"),
           py::arg("start"), py::arg("gathered"), py::arg("transform"))
      .def_static(
          "whole",
          [](std::int64_t samples) {
            WindowTables window{};
            window.samples = window.cells = samples;
            window.band = samples / 2 + 1;
            return window;
          },
          py::arg("samples"));

  py::class_<FilterJob>(m, "Filter", py::module_local())
      .def_static(
          "decimated",
          [](const py::object& mask, int dtype, double background, const WindowTables& rows,
             const WindowTables& columns) {
            FilterJob job{};
            job.plan.form = Form::kDecimated;
            job.plan.mask = to_mask(mask, nullptr);
            job.plan.background = background;
            job.dtype = to_dtype(dtype);
            job.rows = rows;
            job.columns = columns;
            return job;
          },
          py::arg("mask"), py::arg("dtype"), py::arg("background"), py::arg("rows"), py::arg("columns"))
      .def_static(
          "full",
          [](const py::object& mask, Address table, int dtype, Address gains, Address steps, Address roots) {
            FilterJob job{};
            job.plan.form = Form::kFull;
            job.plan.mask = to_mask(mask, pointer<const float>(table));
            job.dtype = to_dtype(dtype);
            job.gains = pointer<const float>(gains);
            job.steps = pointer<const int2>(steps);
            job.roots = pointer<const float2>(roots);
            return job;
          },
          py::arg("mask"), py::arg("table"), py::arg("dtype"), py::arg("gains"), py::arg("steps"),
          py::arg("roots"))
      .def(
          "workspace",
          [](FilterJob job, const std::vector<Address>& matrices,
             const std::vector<std::int64_t>& row_strides, int device, Address stream) {
            set_matrices(job, matrices, row_strides);
            return on_stream(device, stream, [&](cudaStream_t s) { return filter_workspace(job, s); });
          },
          py::arg("matrices"), py::arg("row_strides"), py::arg("device"), py::arg("stream"))
      .def(
          "run",
          [](FilterJob job, const std::vector<Address>& matrices,
             const std::vector<std::int64_t>& row_strides, double scale, Address workspace,
             std::size_t workspace_bytes, int device, Address stream) {
            set_matrices(job, matrices, row_strides);
            job.scale = scale;
            on_stream(device, stream,
                      [&](cudaStream_t s) { filter(job, pointer<void>(workspace), workspace_bytes, s); });
          },
          py::arg("matrices"), py::arg("row_strides"), py::arg("scale"), py::arg("workspace"),
          py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}

}  // namespace freemerge::cuda
