#include <pybind11/stl.h>

#include <tuple>

#include "bind_arrays.h"
#include "bindings.h"
#include "cpu/rice.h"
#include "cpu/sparse.h"

namespace freemerge {
namespace {

Indices indices_of(std::uintptr_t data, bool wide, std::int64_t count) {
  return {reinterpret_cast<const void*>(data), wide, count};
}

using Term = std::tuple<std::uintptr_t, bool, std::int64_t, std::uintptr_t, double>;

// weights, dtype, n; indices, wide, count; values, scale, origin, saved
using Update = std::tuple<std::uintptr_t, int, std::int64_t, std::uintptr_t, bool, std::int64_t,
                          std::uintptr_t, double, std::uintptr_t, std::uintptr_t>;

std::vector<SparseUpdate> updates_of(const std::vector<Update>& updates) {
  std::vector<SparseUpdate> typed;
  typed.reserve(updates.size());
  for (const auto& [weights, dtype, n, indices, wide, count, values, scale, origin, saved] : updates) {
    typed.push_back({reinterpret_cast<void*>(weights), to_dtype(dtype), n, indices_of(indices, wide, count),
                     reinterpret_cast<const float*>(values), scale, reinterpret_cast<const void*>(origin),
                     reinterpret_cast<void*>(saved)});
  }
  return typed;
}

}  // namespace

void bind_sparse(pybind11::module_& m) {
  m.def(
      "sparse_apply",
      [](const std::vector<Update>& updates, int threads) {
        const std::vector<SparseUpdate> typed = updates_of(updates);
        without_gil([&] { sparse_apply(typed, threads); });
      },
      pybind11::arg("updates"), pybind11::arg("threads"));
  m.def(
      "sparse_restore",
      [](const std::vector<Update>& updates, int threads) {
        const std::vector<SparseUpdate> typed = updates_of(updates);
        without_gil([&] { sparse_restore(typed, threads); });
      },
      pybind11::arg("updates"), pybind11::arg("threads"));
  m.def(
      "sparse_sum",
      [](const std::vector<Term>& terms) {
        std::vector<SparseTerm> inputs;
        for (const auto& [indices, wide, count, values, weight] : terms) {
          inputs.push_back(
              {indices_of(indices, wide, count), reinterpret_cast<const float*>(values), weight});
        }
        return arrays(without_gil([&] { return sparse_sum(inputs); }));
      },
      pybind11::arg("terms"));
  m.def(
      "encode_positions",
      [](std::uintptr_t indices, bool wide, std::int64_t count) {
        CodedPositions coded =
            without_gil([&] { return encode_positions(indices_of(indices, wide, count)); });
        return pybind11::make_tuple(static_cast<int>(coded.coding), coded.parameter,
                                    array(std::move(coded.bytes)));
      },
      pybind11::arg("indices"), pybind11::arg("wide"), pybind11::arg("count"));
  m.def(
      "decode_positions",
      [](int coding, int parameter, std::uintptr_t bytes, std::size_t size, std::int64_t count,
         std::int64_t n, std::uintptr_t out, bool wide) {
        const pybind11::gil_scoped_release release;
        decode_positions(static_cast<PositionCoding>(coding), parameter,
                         reinterpret_cast<const std::uint8_t*>(bytes), size, count, n,
                         reinterpret_cast<void*>(out), wide);
      },
      pybind11::arg("coding"), pybind11::arg("parameter"), pybind11::arg("bytes"), pybind11::arg("size"),
      pybind11::arg("count"), pybind11::arg("n"), pybind11::arg("out"), pybind11::arg("wide"));
}

}  // namespace freemerge
