#include "cpu/sparse.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/sparse_updates.h"
#include "cpu/rice.h"

namespace freemerge {

namespace py = pybind11;

namespace {

using Term = std::tuple<std::uintptr_t, bool, std::int64_t, std::uintptr_t, double>;

}  // namespace

void bind_sparse(py::module_& m) {
  py::class_<SparseSwitch>(m, "SparseSwitch", py::module_local())
      .def(
          py::init([](const std::vector<UpdateTuple>& updates) { return SparseSwitch(updates_of(updates)); }),
          py::arg("updates"))
      .def_property_readonly("saved_bytes", &SparseSwitch::saved_bytes)
      .def(
          "apply",
          [](const SparseSwitch& self, std::uintptr_t saved, int threads) {
            without_gil([&] { self.apply(memory<void>(saved, self.saved_bytes()), threads); });
          },
          py::arg("saved"), py::arg("threads"))
      .def(
          "restore",
          [](const SparseSwitch& self, std::uintptr_t saved, int threads) {
            without_gil([&] { self.restore(memory<const void>(saved, self.saved_bytes()), threads); });
          },
          py::arg("saved"), py::arg("threads"));
  m.def(
      "sparse_sum",
      [](const std::vector<Term>& terms) {
        std::vector<SparseTerm> inputs;
        for (const auto& [indices, wide, count, values, weight] : terms) {
          inputs.push_back({indices_of(indices, wide, count), memory<const float>(values, count), weight});
        }
        return arrays(without_gil([&] { return sparse_sum(inputs); }));
      },
      py::arg("terms"));
  m.def(
      "encode_positions",
      [](std::uintptr_t indices, bool wide, std::int64_t count) {
        CodedPositions coded =
            without_gil([&] { return encode_positions(indices_of(indices, wide, count)); });
        return py::make_tuple(static_cast<int>(coded.coding), coded.parameter, array(std::move(coded.bytes)));
      },
      py::arg("indices"), py::arg("wide"), py::arg("count"));
  m.def(
      "decode_positions",
      [](int coding, int parameter, std::uintptr_t bytes, std::size_t size, std::int64_t count,
         std::int64_t n, std::uintptr_t out, bool wide) {
        const py::gil_scoped_release release;
        decode_positions(static_cast<PositionCoding>(coding), parameter,
                         memory<const std::uint8_t>(bytes, static_cast<std::int64_t>(size)), size, count, n,
                         memory<void>(out, count), wide);
      },
      py::arg("coding"), py::arg("parameter"), py::arg("bytes"), py::arg("size"), py::arg("count"),
      py::arg("n"), py::arg("out"), py::arg("wide"));
}

}  // namespace freemerge
