#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/cuda_bindings.h"
#include "bindings/mask.h"
#include "bindings/plan.h"
#include "cuda/column_filter.cuh"
#include "cuda/filter.h"

namespace freemerge::cuda {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// `call` takes an array of bytes and returns the address of its copy on the device. It outlives the result,
// which is called without the GIL.
Upload to_upload(const py::function& call) {
  return [&call](const void* bytes, std::size_t count) -> const void* {
    const py::gil_scoped_acquire gil;
    const py::array_t<std::uint8_t> array(static_cast<py::ssize_t>(count),
                                          static_cast<const std::uint8_t*>(bytes));
    return pointer<const void>(call(array).cast<Address>());
  };
}

MatrixList to_matrices(const std::vector<Address>& pointers, const std::vector<std::int64_t>& row_strides) {
  MatrixList matrices{{}, row_strides};
  for (const Address address : pointers) matrices.data.push_back(memory<void>(address, 1));
  return matrices;
}

SumFirst to_sum(Address base, int base_dtype, const std::vector<Address>& models,
                const std::vector<int>& model_dtypes, const std::vector<double>& weights, std::int64_t n,
                Address results) {
  require(models.size() <= kModelsPerLaunch, "models must be as many as one launch takes");
  require(models.size() == model_dtypes.size() && models.size() == weights.size(),
          "model_dtypes and weights must hold one value per model");
  SumFirst sum{{array(base, base_dtype, n), {}, {}, static_cast<int>(models.size())},
               pointer<double>(results)};
  require_storage(sum.vectors.base);
  for (std::size_t i = 0; i < models.size(); ++i) {
    sum.vectors.models[i] = array(models[i], model_dtypes[i], n);
    require_storage(sum.vectors.models[i]);
    sum.vectors.weights[i] = static_cast<float>(weights[i]);
  }
  return sum;
}

}  // namespace

void bind_filter(py::module_& m) {
  m.attr("LARGEST_COLUMN_PRIME") = kLargestColumnPrime;
  m.def(
      "block_bytes",
      [](int device, Address stream) {
        return on_stream(device, stream, [](cudaStream_t) { return block_bytes(); });
      },
      py::arg("device"), py::arg("stream"));
  m.def(
      "tile_bytes",
      [](std::int64_t height, std::int64_t width, const py::object& object) {
        const Tiles tiles = to_tiles(object);
        require(tiles.parts > 0, "tiles must have parts");
        const std::int64_t length = height / tiles.parts;
        return py::make_tuple(
            row_bytes(line_passes(width, tiles.row_chirp).passes.length, tiles.parts),
            column_bytes(line_passes(length, tiles.column_chirp).passes.length, tiles.columns));
      },
      py::arg("height"), py::arg("width"), py::arg("tiles"));
  m.def(
      "longest_column",
      [](int device, Address stream) {
        return on_stream(device, stream, [](cudaStream_t) { return longest_column(); });
      },
      py::arg("device"), py::arg("stream"));

  m.attr("MODELS_PER_LAUNCH") = kModelsPerLaunch;
  py::class_<SumFirst>(m, "SumFirst", py::module_local())
      .def(py::init(&to_sum), py::arg("base"), py::arg("base_dtype"), py::arg("models"),
           py::arg("model_dtypes"), py::arg("weights"), py::arg("n"), py::arg("results"));

  py::class_<AddLast>(m, "AddLast", py::module_local())
      .def(py::init([](Address out, int out_dtype, Address base, int base_dtype, std::int64_t n, double scale,
                       double factor) {
             return AddLast{array(out, out_dtype, n), array(base, base_dtype, n), static_cast<float>(scale),
                            static_cast<float>(factor)};
           }),
           py::arg("out"), py::arg("out_dtype"), py::arg("base"), py::arg("base_dtype"), py::arg("n"),
           py::arg("scale"), py::arg("factor"));

  // Local to the module: its emulated twin registers the same type.
  py::class_<Filter>(m, "Filter", py::module_local())
      .def(py::init([](const std::string& form, const py::object& mask, Address table, int dtype,
                       double background, const py::object& rows, const py::object& columns, bool fused,
                       const py::object& tiles, const Floats& column_gains, const py::function& upload) {
             Plan plan;
             plan.form = named(kFormNames, form, "form").form;
             plan.mask = to_mask(mask, pointer<const float>(table));
             plan.background = background;
             plan.rows = to_decimation(rows);
             plan.columns = to_decimation(columns);
             plan.fused = fused;
             plan.tiles = to_tiles(tiles);
             const float* first = column_gains.data();
             const std::vector<float> gains(first, first + column_gains.size());
             return without_gil([&] { return Filter(plan, to_dtype(dtype), gains, to_upload(upload)); });
           }),
           py::kw_only(), py::arg("form"), py::arg("mask"), py::arg("table"), py::arg("dtype"),
           py::arg("background"), py::arg("rows"), py::arg("columns"), py::arg("fused"), py::arg("tiles"),
           py::arg("column_gains"), py::arg("upload"))
      .def_readwrite("chunk_rows", &Filter::chunk_rows)
      .def("adds", &Filter::adds, py::arg("add"))
      .def(
          "workspace_bytes",
          [](const Filter& self, const std::vector<Address>& pointers,
             const std::vector<std::int64_t>& row_strides, int device, Address stream, const SumFirst* sum) {
            const MatrixList matrices = to_matrices(pointers, row_strides);
            return on_stream(device, stream,
                             [&](cudaStream_t s) { return self.workspace_bytes(matrices, s, sum); });
          },
          py::arg("pointers"), py::arg("row_strides"), py::arg("device"), py::arg("stream"),
          py::arg("sum") = py::none())
      .def(
          "run",
          [](const Filter& self, const std::vector<Address>& pointers,
             const std::vector<std::int64_t>& row_strides, double scale, Address workspace,
             std::size_t workspace_bytes, int device, Address stream, const SumFirst* sum) {
            const MatrixList matrices = to_matrices(pointers, row_strides);
            on_stream(device, stream, [&](cudaStream_t s) {
              self.run(matrices, scale, pointer<void>(workspace), workspace_bytes, s, sum);
            });
          },
          py::arg("pointers"), py::arg("row_strides"), py::arg("scale"), py::arg("workspace"),
          py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"), py::arg("sum") = py::none())
      .def(
          "run_last",
          [](const Filter& self, const std::vector<Address>& pointers,
             const std::vector<std::int64_t>& row_strides, Address workspace, std::size_t workspace_bytes,
             int device, Address stream, const SumFirst& sum, const AddLast* add) {
            const MatrixList matrices = to_matrices(pointers, row_strides);
            on_stream(device, stream, [&](cudaStream_t s) {
              self.run_last(matrices, pointer<void>(workspace), workspace_bytes, s, sum,
                            add ? *add : AddLast{});
            });
          },
          py::arg("pointers"), py::arg("row_strides"), py::arg("workspace"), py::arg("workspace_bytes"),
          py::arg("device"), py::arg("stream"), py::arg("sum"), py::arg("add") = py::none());
}

}  // namespace freemerge::cuda
