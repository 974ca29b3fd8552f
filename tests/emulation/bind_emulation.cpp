// Switches of the emulation that only tests touch; the module is otherwise the real one.
#include <pybind11/stl.h>

#include <vector>

#include "bindings/cuda_bindings.h"
#include "bindings/mask.h"
#include "cuda/mask_gain.cuh"
#include "emulation/device/runtime.h"
#include "emulation/device/scheduler.h"

namespace freemerge::cuda {

namespace py = pybind11;

namespace {

// Two counts of each watched range.
py::list each_range(std::uint64_t emulation::Traffic::* first, std::uint64_t emulation::Traffic::* second) {
  emulation::Traffic ranges[16];
  const int count = emulation::watched(ranges, 16);
  py::list list;
  for (int i = 0; i < count; ++i) list.append(py::make_tuple(ranges[i].*first, ranges[i].*second));
  return list;
}

}  // namespace

void bind_emulation(py::module_& m) {
  py::enum_<emulation::Order>(m, "Order", py::module_local())
      .value("forward", emulation::Order::kForward)
      .value("reverse", emulation::Order::kReverse)
      .value("random", emulation::Order::kRandom);
  m.def("set_order", &emulation::set_order, py::arg("order"));
  m.def("set_capturing", &emulation::set_capturing, py::arg("capturing"));
  m.def("set_device_count_error", &emulation::set_device_count_error, py::arg("code"));
  m.def(
      "watch", [](Address begin, std::size_t bytes) { emulation::watch(pointer<const void>(begin), bytes); },
      py::arg("begin"), py::arg("bytes"));
  m.def("watched", [] { return each_range(&emulation::Traffic::loaded, &emulation::Traffic::stored); });
  m.def("accesses", [] { return each_range(&emulation::Traffic::loads, &emulation::Traffic::stores); });
  m.def("unwatch_all", &emulation::unwatch_all);
  m.def(
      "smooth_gains",
      [](const py::object& params, std::vector<double> squared_radii) {
        const KernelMask mask = to_mask(params, nullptr);
        std::vector<float> gains;
        for (const double r2 : squared_radii) gains.push_back(mask.smooth.gain<float>(r2));
        return gains;
      },
      py::arg("mask"), py::arg("squared_radii"));
}

}  // namespace freemerge::cuda
