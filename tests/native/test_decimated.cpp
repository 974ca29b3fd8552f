// Random decimated filters (shapes, strides, storage types, boxes around DC and Nyquist, windows, batches,
// threads, instruction sets) against the definition.
#include "check.h"
#include "cpu/filter.h"
#include "filter_oracle.h"

namespace freemerge {
namespace {

using namespace test;

// A window for `samples` samples whose cells exceed the band's width 1.6 times at least, and the error it
// leaves.
Decimation random_decimation(Random& random, std::int64_t samples, std::int64_t cells, bool half_bins,
                             double& error) {
  Decimation d;
  d.cells = cells;
  d.taps = static_cast<int>(random.integer(kMinTaps, kMaxTaps));
  d.band = random.integer(1, (cells * 5 / 8 + 1) / 2);
  d.nyquist = (samples % 2 == 0 || half_bins) && random.integer(0, 2) == 0;
  const double filled =
      static_cast<double>(2 * d.band - 1 + half_bin(d, samples)) / static_cast<double>(cells);
  error = 6 * std::exp(-std::acos(-1.0) * d.taps * std::sqrt(1 - filled));
  return d;
}

// A high-pass disc inside the box, or any symmetric gains in the box, or one step of them down the rows.
Mask random_mask(Random& random, std::int64_t height, std::int64_t width, const Plan& plan,
                 std::vector<float>& table) {
  Mask mask;
  mask.height = height;
  mask.width = width;
  if (!plan.rows.nyquist && !plan.columns.nyquist && random.integer(0, 1) == 0) {
    mask.edge0 = random.real(0, 1) * static_cast<double>(std::min(plan.rows.band, plan.columns.band));
    mask.edge1 = static_cast<double>(std::min(plan.rows.band, plan.columns.band));
    mask.gain0 = random.real(-1, 1);
    mask.gain1 = random.real(0, 2);
    mask.gain2 = plan.background;
    return mask;
  }
  const std::int64_t columns = width / 2 + 1;
  table.assign(static_cast<std::size_t>(height * columns), static_cast<float>(plan.background));
  const auto set = [&](std::int64_t y, std::int64_t x, float gain) {
    y = (y + 2 * height) % height;
    x = (x + 2 * width) % width;
    if (x < columns) table[static_cast<std::size_t>(y * columns + x)] = gain;
  };
  const int half = half_bin(plan.rows, height);
  const std::int64_t centre_y = plan.rows.nyquist ? (height + half) / 2 : 0;
  const std::int64_t centre_x = plan.columns.nyquist ? width / 2 : 0;
  const bool steps = random.integer(0, 1) == 0;
  const std::int64_t bound = random.integer(0, plan.rows.band);
  for (std::int64_t a = 1 - plan.rows.band - half; a < plan.rows.band; ++a) {
    for (std::int64_t k = 0; k < plan.columns.band; ++k) {
      if ((k == 0 || 2 * k == width) && a < 0) continue;
      const bool inner = (a < 0 ? -a - half : a) < bound;
      const auto gain = static_cast<float>(steps ? (inner ? 1.5 : -0.5) : random.real(-1, 2));
      set(centre_y + a, centre_x + k, gain);
      set(-centre_y - a, -centre_x - k, gain);
    }
  }
  mask.kind = MaskKind::kTable;
  mask.table = table.data();
  return mask;
}

template <typename Storage>
void test_case(Random& random, DType dtype, const Kernels& kernels, const std::string& name) {
  const std::int64_t height = random.integer(40, 230), width = random.integer(24, 230);
  const std::int64_t stride = width + (random.integer(0, 1) == 0 ? 0 : random.integer(1, 40));
  double row_error = 0, column_error = 0;
  Plan plan;
  plan.form = Form::kDecimated;
  plan.rows = random_decimation(random, height, 32 * random.integer(1, height / 32), true, row_error);
  plan.columns = random_decimation(random, width, random.integer(2 * kMaxTaps, width), false, column_error);
  switch (random.integer(0, 3)) {
    case 0:
      plan.columns = {width, 0, width / 2 + 1, false};
      column_error = 0;
      break;
    case 1:
      plan.rows = {height, 0, height / 2 + 1, false};
      row_error = 0;
      break;
    default:
      break;
  }
  plan.background = static_cast<double>(random.integer(0, 2)) / 2;
  std::vector<float> table;
  plan.mask = random_mask(random, height, width, plan, table);
  const double scale = random.integer(0, 1) == 0 ? 1 : random.real(-2, 2);
  const int threads = static_cast<int>(random.integer(1, 3));
  const auto axis = [](const Decimation& d) {
    return std::to_string(d.cells) + "/" + std::to_string(d.taps) + "/" + std::to_string(d.band) +
           (d.nyquist ? "N" : "");
  };
  const std::string label = name + " " + std::to_string(height) + "x" + std::to_string(width) + " stride " +
                            std::to_string(stride) + " rows " + axis(plan.rows) + " columns " +
                            axis(plan.columns);

  Matrices<Storage> matrices(random, height, width, stride);
  const auto filter = make_filter(plan, dtype, {}, kernels);
  std::vector<float> means;  // what is taken out and added again makes no difference, whatever it is
  if (dtype == DType::kFloat32 && random.integer(0, 1) == 0) {
    for (std::size_t i = 0; i < matrices.count(); ++i)
      means.push_back(static_cast<float>(random.real(-1, 1)));
  }
  matrices.run(*filter, table, scale, threads, means);

  for (std::size_t i = 0; i < matrices.count(); ++i) {
    const Squares squares = matrices.compare(i, plan.mask, scale, label);
    const double error = std::sqrt(squares.difference / squares.input);
    const double flips =
        Precision<Storage>::kSpacing * (0.05 + 2 / std::sqrt(static_cast<double>(height * width)));
    const double tolerance = 2 * (Precision<Storage>::kError + flips + row_error + column_error);
    check(error <= tolerance, label + ": error " + std::to_string(error * 1e9) + "e-9");
  }
}

// Same bytes whatever the number of threads, and for a batch as for each of its matrices.
void test_determinism(const Kernels& kernels) {
  Random random(7);
  Plan plan;
  plan.form = Form::kDecimated;
  plan.mask.height = 401;
  plan.mask.width = 203;
  plan.mask.edge0 = plan.mask.edge1 = 20;
  plan.mask.gain1 = plan.mask.gain2 = plan.background = 1;
  plan.columns = {80, 7, 20, false};
  std::vector<float> input(401 * 203);
  for (float& x : input) x = static_cast<float>(random.normal());
  for (const Decimation& rows :
       {Decimation{96, 8, 20, false}, Decimation{96, 8, 20, true}, Decimation{401, 0, 201, false}}) {
    plan.rows = rows;
    std::vector<float> first;
    const auto filter = make_filter(plan, DType::kFloat32, {}, kernels);
    check(filter->nbytes() > 0, "its tables take memory");
    for (const int threads : {1, 2, 3, 7}) {
      std::vector<float> x = input, y = input;
      filter->run({x.data(), y.data()}, {203, 203}, 1.0, threads);
      if (first.empty()) first = x;
      check(x == first && y == first, "results do not depend on the number of threads");
    }
  }
}

// What it cannot do is refused before anything is written.
void test_refusals(const Kernels& kernels) {
  std::vector<float> x(64 * 64, 1.0f);
  Plan plan;
  plan.form = Form::kDecimated;
  plan.mask.height = plan.mask.width = 64;
  plan.rows = plan.columns = {32, 7, 4, false};
  const auto refuses = [&](auto change, DType dtype, std::int64_t stride, const std::string& what) {
    Plan changed = plan;
    change(changed);
    bool thrown = false;
    try {
      make_filter(changed, dtype, {}, kernels)->run({x.data()}, {stride}, 1.0, 1);
    } catch (const std::invalid_argument& error) {
      thrown = std::string(error.what()).find(what) != std::string::npos;
    }
    check(thrown && x == std::vector<float>(64 * 64, 1.0f), "refused: " + what);
  };
  refuses([](Plan&) {}, DType::kFloat64, 64, "float64");
  refuses([](Plan&) {}, DType::kFloat32, 63, "row_stride");
  refuses([](Plan& p) { p.rows.taps = kMaxTaps + 1; }, DType::kFloat32, 64, "taps");
  refuses([](Plan& p) { p.rows.cells = 33; }, DType::kFloat32, 64, "multiple");
  refuses([](Plan& p) { p.columns.cells = 65; }, DType::kFloat32, 64, "samples");
  refuses([](Plan& p) { p.columns.band = 17; }, DType::kFloat32, 64, "highest frequency");
  refuses([](Plan& p) { p.columns.taps = 0; }, DType::kFloat32, 64, "whole");
  refuses([](Plan& p) { p.mask.height = 63, p.rows = {32, 7, 16, true}; }, DType::kFloat32, 64,
          "highest frequency");
  refuses([](Plan& p) { p.mask.width = 63, p.columns.nyquist = true; }, DType::kFloat32, 64, "odd width");
  refuses([](Plan& p) { p.rows = p.columns = {64, 0, 33, false}; }, DType::kFloat32, 64, "taps");
  bool thrown = false;
  try {
    make_filter(plan, DType::kFloat32, {}, kernels)->run({x.data()}, {64}, 1.0, 1, {1.0f, 2.0f});
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  check(thrown && x == std::vector<float>(64 * 64, 1.0f), "refused: two means of one matrix");
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
      test_case<bfloat16>(random, DType::kBFloat16, table, name + " bfloat16");
      test_case<float16>(random, DType::kFloat16, table, name + " float16");
    }
    test_determinism(table);
    test_refusals(table);
    std::printf("%s: %d cases of each type\n", name.c_str(), cases);
  }
}
