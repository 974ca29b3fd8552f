// Random full and pruned filters (shapes, strides, storage types, masks, batches, threads, instruction sets)
// against the definition: two DFTs of the rows and columns in double precision, bin by bin masks, and back.
#include <iterator>
#include <thread>

#include "check.h"
#include "cpu/filter.h"
#include "filter_oracle.h"

namespace freemerge {
namespace {

using namespace test;

Mask random_mask(Random& random, std::int64_t height, std::int64_t width, std::vector<float>& table) {
  const double side = static_cast<double>(std::min(height, width));
  Mask mask;
  mask.kind = kMaskNames[random.integer(0, static_cast<std::int64_t>(std::size(kMaskNames)) - 1)].kind;
  mask.height = height;
  mask.width = width;
  if (random.integer(0, 3) == 0) {
    mask.unit_y = side / static_cast<double>(height);
    mask.unit_x = side / static_cast<double>(width);
  }
  mask.axis = static_cast<int>(random.integer(0, 1));
  mask.order = random.integer(0, 1) == 0 ? random.real(1, 4) : static_cast<double>(random.integer(1, 5));
  mask.edge0 = random.real(0.01, 0.5) * side;
  mask.edge1 = random.integer(0, 1) == 0 ? 1e300 : random.real(1, 2) * mask.edge0;
  mask.gain0 = random.integer(0, 1) == 0 ? 0 : random.real(0, 1);
  mask.gain1 = random.integer(0, 1) == 0 ? 1 : random.real(0, 2);
  mask.gain2 = random.integer(0, 1) == 0 ? 0 : 1;
  if (mask.kind == MaskKind::kOfficial) {
    mask.edge0 = random.real(0.3, 1) * side;
    mask.edge1 = static_cast<double>(std::min(height, width) / 10);
  }
  if (mask.kind == MaskKind::kTable) {
    const std::int64_t columns = width / 2 + 1;
    table.assign(static_cast<std::size_t>(height * columns), 0);
    const auto at = [&](std::int64_t y, std::int64_t k) -> float& {
      return table[static_cast<std::size_t>(y * columns + k)];
    };
    for (float& gain : table) gain = static_cast<float>(random.real(-1, 2));
    for (std::int64_t y = 0; y < height; ++y) {  // the columns that are their own mirror image
      at((height - y) % height, 0) = at(y, 0);
      if (width % 2 == 0) at((height - y) % height, width / 2) = at(y, width / 2);
    }
    mask.table = table.data();
  }
  return mask;
}

// The gain of each column (row, if transposed) that has one gain, NaN for the others. The official mask is
// the mean of two discs: both must have one gain there.
std::vector<double> column_gains(const Mask& mask, bool transposed) {
  const std::int64_t length = transposed ? mask.height : mask.width;
  const std::int64_t signals = transposed ? mask.width : mask.height;
  const bool official = mask.kind == MaskKind::kOfficial && signals > 1;
  const auto gain = [&](std::int64_t column, std::int64_t row) {
    const std::int64_t y = transposed ? column : row, x = transposed ? row : column;
    if (official) return official_gain(mask, y, x);
    if (x <= mask.width / 2) return mask_gain(mask, y, x);
    return mask_gain(mask, (mask.height - y) % mask.height, mask.width - x);
  };
  const auto constant = [&](std::int64_t column) {
    std::int64_t row = 1;
    while (row < signals && gain(column, row) == gain(column, 0)) ++row;
    return row == signals;
  };
  std::vector<double> gains;
  for (std::int64_t column = 0; column <= length / 2; ++column) {
    const std::int64_t mirror = (length - column) % length;
    const bool varies = !constant(column) || (official && !constant(mirror));
    gains.push_back(varies     ? std::nan("")
                    : official ? (gain(column, 0) + gain(mirror, 0)) / 2
                               : gain(column, 0));
  }
  return gains;
}

std::int64_t random_side(Random& random) {
  // Whole vectors, large primes, lengths that are transformed in two levels, and rows that are lines, with
  // and without a last group that overlaps.
  static constexpr std::int64_t kNotable[] = {32,  64,  67,  96,  101, 127, 128,
                                              192, 201, 256, 272, 330, 384, 416};
  switch (random.integer(0, 2)) {
    case 0:
      return random.integer(1, 9);
    case 1:
      return random.integer(10, 110);
    default:
      return kNotable[random.integer(0, static_cast<std::int64_t>(std::size(kNotable)) - 1)];
  }
}

template <typename Storage>
void test_case(Random& random, DType dtype, const Kernels& kernels, const std::string& name) {
  const std::int64_t height = random_side(random), width = random_side(random);
  const std::int64_t stride = width + (random.integer(0, 1) == 0 ? 0 : random.integer(1, 40));
  std::vector<float> table;
  Plan plan;
  plan.mask = random_mask(random, height, width, table);
  plan.transposed = random.integer(0, 1) == 0;
  const std::vector<double> gains = column_gains(plan.mask, plan.transposed);
  std::vector<double> backgrounds;
  for (const double gain : gains) {
    if (!std::isnan(gain)) backgrounds.push_back(gain);
  }
  const bool pruned = !backgrounds.empty() && random.integer(0, 2) > 0;
  plan.form = pruned ? Form::kPruned : Form::kFull;
  plan.packed = !pruned && !plan.transposed && sizeof(Storage) >= 4 && random.integer(0, 1) == 0;
  if (pruned) {
    plan.background = backgrounds[static_cast<std::size_t>(
        random.integer(0, static_cast<std::int64_t>(backgrounds.size()) - 1))];
  }
  const double scale = random.integer(0, 1) == 0 ? 1 : random.real(-2, 2);
  const int threads = static_cast<int>(random.integer(1, 3));
  const std::string label = name + " " + std::to_string(height) + "x" + std::to_string(width) + " stride " +
                            std::to_string(stride) + " mask " +
                            std::to_string(static_cast<int>(plan.mask.kind)) +
                            (pruned        ? " pruned"
                             : plan.packed ? " packed"
                                           : " full") +
                            (plan.transposed ? " transposed" : "");

  Matrices<Storage> matrices(random, height, width, stride);
  const auto filter = make_filter(plan, dtype, gains, kernels);
  matrices.run(*filter, table, scale, threads);

  for (std::size_t i = 0; i < matrices.count(); ++i) {
    const Squares squares = matrices.compare(i, plan.mask, scale, label);
    // Where the filter removes nearly everything, rounding is relative to what it removed.
    const double error = std::sqrt(squares.difference / std::max(squares.expected, 0.1 * squares.input));
    const double flips =
        Precision<Storage>::kSpacing * (0.05 + 4 / std::sqrt(static_cast<double>(height * width)));
    const double tolerance = Precision<Storage>::kError * (pruned ? 2 : 1) + flips;
    check(error <= tolerance, label + ": error " + std::to_string(error * 1e9) + "e-9");
  }
}

// Same bytes whatever the number of threads, also where several run one filter at the same time.
void test_determinism(const Kernels& kernels, std::int64_t width) {
  Random random(7);
  Plan plan;
  plan.form = Form::kFull;
  plan.packed = true;
  plan.mask.height = 150;
  plan.mask.width = width;
  plan.mask.edge0 = 40;
  plan.mask.edge1 = 1e300;
  plan.mask.gain1 = 1;
  std::vector<float> input(static_cast<std::size_t>(150 * width)), first;
  for (float& x : input) x = static_cast<float>(random.normal());
  const auto filter = make_filter(plan, DType::kFloat32, column_gains(plan.mask, false), kernels);
  check(filter->nbytes() > 0, "its tables take memory");
  for (const int threads : {1, 2, 5}) {
    std::vector<float> x = input;
    filter->run({x.data()}, {width}, 1.0, threads);
    if (first.empty()) first = x;
    check(x == first, "results do not depend on the number of threads");
  }
  std::vector<std::vector<float>> matrices(4, input);
  std::vector<std::thread> callers;
  for (std::vector<float>& x : matrices)
    callers.emplace_back([&] { filter->run({x.data()}, {width}, 1.0, 1); });
  for (std::thread& caller : callers) caller.join();
  for (const std::vector<float>& x : matrices) check(x == first, "several threads may run one filter");
}

// What cannot be is refused.
void test_refusals(const Kernels& kernels) {
  Plan plan;
  plan.form = Form::kPruned;
  plan.mask.height = plan.mask.width = 64;
  plan.mask.edge0 = plan.mask.edge1 = 20;
  plan.mask.gain1 = plan.mask.gain2 = 1;
  const std::vector<double> gains = column_gains(plan.mask, false);
  const auto refuses = [&](const Plan& wrong, std::vector<double> columns, const std::string& what) {
    bool refused = false;
    try {
      make_filter(wrong, DType::kFloat32, std::move(columns), kernels);
    } catch (const std::invalid_argument& error) {
      refused = std::string(error.what()).find(what) != std::string::npos;
    }
    check(refused, "refused: " + what);
  };
  refuses(plan, gains, "background");
  plan.background = 1;
  refuses(plan, {1.0}, "column_gains");
  plan.packed = true;
  refuses(plan, gains, "packed");
}

}  // namespace
}  // namespace freemerge

int main(int argc, char** argv) {
  using namespace freemerge;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  for (const Isa isa : test::available_isas()) {
    const Kernels& table = kernels(isa);
    const std::string name = isa_name(isa);
    Random random(static_cast<unsigned>(isa) + 1);
    for (int i = 0; i < cases; ++i) {
      test_case<float>(random, DType::kFloat32, table, name + " float32");
      test_case<double>(random, DType::kFloat64, table, name + " float64");
      test_case<bfloat16>(random, DType::kBFloat16, table, name + " bfloat16");
      test_case<float16>(random, DType::kFloat16, table, name + " float16");
    }
    test_determinism(table, 203);
    test_determinism(table, 272);
    test_refusals(table);
    std::printf("%s: %d cases of each type\n", name.c_str(), cases);
  }
}
