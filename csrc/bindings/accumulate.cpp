#include "cpu/accumulate.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"

namespace freemerge {
namespace {

Storage storage(std::uintptr_t data, int dtype, std::int64_t n) {
  return {memory<const void>(data, n), to_dtype(dtype)};
}

Election to_election(const std::array<std::uintptr_t, 2>& sums, const std::array<std::uintptr_t, 2>& shares,
                     std::int64_t n) {
  return {{memory<void>(sums[0], n), memory<void>(sums[1], n)},
          {pointer<void>(shares[0]), pointer<void>(shares[1])}};
}

}  // namespace

void bind_accumulate(pybind11::module_& m) {
  m.def(
      "accumulate",
      [](std::uintptr_t out, std::uintptr_t base, int base_dtype, const std::vector<std::uintptr_t>& models,
         const std::vector<int>& model_dtypes, const std::vector<double>& weights, bool squares,
         std::int64_t n, int threads) {
        require(models.size() == model_dtypes.size(), "model_dtypes must hold one dtype per model");
        std::vector<Storage> sources;
        for (std::size_t i = 0; i < models.size(); ++i)
          sources.push_back(storage(models[i], model_dtypes[i], n));
        const Accumulated result = without_gil([&] {
          return accumulate(pointer<void>(out), storage(base, base_dtype, n), sources, weights, squares, n,
                            threads);
        });
        return std::pair(result.means, result.squares);
      },
      pybind11::arg("out"), pybind11::arg("base"), pybind11::arg("base_dtype"), pybind11::arg("models"),
      pybind11::arg("model_dtypes"), pybind11::arg("weights"), pybind11::arg("squares"), pybind11::arg("n"),
      pybind11::arg("threads"));
  m.def(
      "add_round",
      [](std::uintptr_t out, int out_dtype, std::uintptr_t base, int base_dtype, std::uintptr_t delta,
         int delta_dtype, double scale, double factor, std::int64_t n, int threads) {
        const pybind11::gil_scoped_release release;
        return add_round(memory<void>(out, n), to_dtype(out_dtype), storage(base, base_dtype, n),
                         storage(delta, delta_dtype, n), scale, factor, n, threads);
      },
      pybind11::arg("out"), pybind11::arg("out_dtype"), pybind11::arg("base"), pybind11::arg("base_dtype"),
      pybind11::arg("delta"), pybind11::arg("delta_dtype"), pybind11::arg("scale"), pybind11::arg("factor"),
      pybind11::arg("n"), pybind11::arg("threads"));
  m.def(
      "elect",
      [](const std::array<std::uintptr_t, 2>& sums, const std::array<std::uintptr_t, 2>& shares,
         std::uintptr_t delta, int dtype, double weight, float least, float outlier, std::int64_t n,
         int threads) {
        const Election election = to_election(sums, shares, n);
        const pybind11::gil_scoped_release release;
        elect(election, storage(delta, dtype, n), weight, {least, outlier}, n, threads);
      },
      pybind11::arg("sums"), pybind11::arg("shares"), pybind11::arg("delta"), pybind11::arg("dtype"),
      pybind11::arg("weight"), pybind11::arg("least"), pybind11::arg("outlier"), pybind11::arg("n"),
      pybind11::arg("threads"));
  m.def(
      "decide",
      [](const std::array<std::uintptr_t, 2>& sums, const std::array<std::uintptr_t, 2>& shares, int dtype,
         std::int64_t n, int threads) {
        const Election election = to_election(sums, shares, n);
        const pybind11::gil_scoped_release release;
        decide(election, to_dtype(dtype), n, threads);
      },
      pybind11::arg("sums"), pybind11::arg("shares"), pybind11::arg("dtype"), pybind11::arg("n"),
      pybind11::arg("threads"));
  m.def(
      "square_sum",
      [](std::uintptr_t data, int dtype, std::int64_t n, int threads) {
        const pybind11::gil_scoped_release release;
        return square_sum(storage(data, dtype, n), n, threads);
      },
      pybind11::arg("data"), pybind11::arg("dtype"), pybind11::arg("n"), pybind11::arg("threads"));
}

}  // namespace freemerge
