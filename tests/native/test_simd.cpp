// Storage conversions of every instruction set against dtype.h, on every 16-bit pattern and on floats around
// every rounding boundary: a filter that changes nothing (background 1, no column kept) loads, scales and
// stores.
#include <cstring>
#include <limits>

#include "check.h"
#include "cpu/filter.h"

namespace freemerge {
namespace {

using test::check;

Plan scaling(std::int64_t width) {
  Plan plan;
  plan.form = Form::kPruned;
  plan.background = 1;
  plan.mask.height = 1;
  plan.mask.width = width;
  plan.mask.gain1 = plan.mask.gain2 = plan.mask.gain0 = 1;
  return plan;
}

template <typename Storage>
void test_patterns(DType dtype, const Kernels& kernels, const std::string& name) {
  std::vector<Storage> x;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) x.push_back({static_cast<std::uint16_t>(bits)});
  const std::vector<Storage> input = x;
  // 1.0009765625 = 1 + 2^-10 lands on and around the halfway points of both formats.
  for (const double scale : {1.0, 1.0009765625, 0.3333333, 1e-5}) {
    x = input;
    const auto width = static_cast<std::int64_t>(x.size());
    make_filter(scaling(width), dtype, std::vector<double>(x.size() / 2 + 1, 1.0), kernels)
        ->run({x.data()}, {width}, scale, 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const float value = to_float(input[i]) * static_cast<float>(scale);
      const Storage expected = round_to<Storage>(value);
      if (std::isnan(value)) {  // of any payload
        check(std::isnan(to_float(x[i])), [&] { return name + ": NaN pattern " + std::to_string(i); });
        continue;
      }
      const bool zero = value == 0 && to_float(x[i]) == 0;  // -0 + 0 is 0
      check(zero || x[i].bits == expected.bits,
            [&] { return name + ": pattern " + std::to_string(i) + " times " + std::to_string(scale); });
    }
  }
}

}  // namespace
}  // namespace freemerge

int main() {
  using namespace freemerge;
  for (const Isa isa : test::available_isas()) {
    test_patterns<bfloat16>(DType::kBFloat16, kernels(isa), isa_name(isa) + " bfloat16");
    test_patterns<float16>(DType::kFloat16, kernels(isa), isa_name(isa) + " float16");
  }
}
