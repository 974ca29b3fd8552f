#include <pybind11/stl.h>

#include <vector>

#include "bindings/bindings.h"
#include "cpu/sha256.h"

namespace freemerge {

void bind_hashing(pybind11::module_& m) {
  m.def("has_sha256", &has_sha256);
  m.def(
      "sha256",
      [](const std::vector<std::uintptr_t>& states, const std::vector<std::uintptr_t>& data,
         std::int64_t blocks) {
        require(states.size() == data.size(), "data must hold one address per state");
        std::vector<Sha256Stream> streams;
        for (std::size_t i = 0; i < states.size(); ++i)
          streams.push_back(
              {memory<std::uint32_t>(states[i], 8), memory<const std::uint8_t>(data[i], blocks)});
        const pybind11::gil_scoped_release release;
        sha256(streams.data(), static_cast<int>(streams.size()), blocks);
      },
      pybind11::arg("states"), pybind11::arg("data"), pybind11::arg("blocks"));
}

}  // namespace freemerge
