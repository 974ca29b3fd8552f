// The filter and the other device operations against plain float64 loops, on buffers without a byte to spare:
// run under AddressSanitizer and UBSan. `kernels CUFFT_STAND_IN` prints "ok" if everything agrees, in every
// thread order.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "common/dtype.h"
#include "cuda/accumulate.cuh"
#include "cuda/cufft_api.h"
#include "cuda/error.h"
#include "cuda/filter.h"
#include "cuda/select.cuh"
#include "cuda/sparse.cuh"
#include "emulation/device/scheduler.h"

namespace {

using namespace freemerge;
using namespace freemerge::cuda;

int failures = 0;

void expect(bool condition, const char* what, double value = 0.0) {
  if (condition) return;
  std::printf("FAILED: %s (%g)\n", what, value);
  ++failures;
}

// A device buffer: exactly the bytes asked for.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : data_(static_cast<T*>(std::malloc(count * sizeof(T)))), count_(count) {
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    std::copy(values.begin(), values.end(), data_);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() { return data_; }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return data_[i]; }

 private:
  T* data_;
  std::size_t count_;
};

struct Shape {
  std::int64_t height;
  std::int64_t width;
  std::int64_t row_stride;
};

Mask high_pass(const Shape& s, double edge) {
  Mask mask;
  mask.height = s.height;
  mask.width = s.width;
  mask.edge0 = mask.edge1 = edge;
  mask.gain0 = 0.0;
  mask.gain1 = mask.gain2 = 1.0;
  return mask;
}

// y = scale * Re(idft(M * dft(x))), separable sums in float64.
std::vector<double> reference(const std::vector<double>& x, const Mask& mask, double scale) {
  const auto h = static_cast<std::size_t>(mask.height);
  const auto w = static_cast<std::size_t>(mask.width);
  using Complex = std::complex<double>;
  const auto transform = [](std::vector<Complex> in, std::size_t rows, std::size_t columns, double sign) {
    std::vector<Complex> out(rows * columns);  // transposed
    std::vector<Complex> roots(columns);
    for (std::size_t n = 0; n < columns; ++n)
      roots[n] = std::polar(1.0, sign * 2.0 * M_PI * double(n) / double(columns));
    for (std::size_t k = 0; k < columns; ++k) {
      for (std::size_t r = 0; r < rows; ++r) {
        Complex sum = 0.0;
        for (std::size_t n = 0; n < columns; ++n) sum += in[r * columns + n] * roots[k * n % columns];
        out[k * rows + r] = sum;
      }
    }
    return out;
  };
  std::vector<Complex> spectrum(x.begin(), x.end());
  spectrum = transform(transform(spectrum, h, w, -1.0), w, h, -1.0);
  for (std::size_t k = 0; k < h; ++k) {
    for (std::size_t l = 0; l < w; ++l) {
      const bool half = l <= w / 2;
      const auto ky = static_cast<std::int64_t>(half ? k : (h - k) % h);
      const auto kx = static_cast<std::int64_t>(half ? l : w - l);
      spectrum[k * w + l] *= scale * mask_gain(mask, ky, kx) / double(h * w);
    }
  }
  spectrum = transform(transform(spectrum, h, w, 1.0), w, h, 1.0);
  std::vector<double> y(x.size());
  std::transform(spectrum.begin(), spectrum.end(), y.begin(), [](const Complex& c) { return c.real(); });
  return y;
}

template <typename T>
double wide(T x) {
  return static_cast<double>(to_float(x));
}

// A prepared filter, whose tables are buffers of their own.
struct PreparedFilter {
  PreparedFilter(const Plan& plan, DType dtype, const std::vector<float>& column_gains)
      : filter(plan, dtype, column_gains, [this](const void* bytes, std::size_t count) -> const void* {
          const auto* first = static_cast<const char*>(bytes);
          tables.push_back(std::make_unique<Buffer<char>>(std::vector<char>(first, first + count)));
          return tables.back()->get();
        }) {}

  std::vector<std::unique_ptr<Buffer<char>>> tables;
  Filter filter;
};

// Two matrices of one shape.
template <typename T>
void check_filter(const Plan& plan, const std::vector<float>& column_gains, const Shape& s, DType dtype,
                  double tolerance, const char* what) {
  constexpr double kScale = 1.25;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto entries = static_cast<std::size_t>((s.height - 1) * s.row_stride + s.width);
  std::vector<std::unique_ptr<Buffer<T>>> matrices;
  std::vector<std::vector<double>> expected;
  MatrixList list;
  for (int m = 0; m < 2; ++m) {
    matrices.push_back(std::make_unique<Buffer<T>>(entries));
    std::vector<double> x;
    for (std::int64_t r = 0; r < s.height; ++r) {
      for (std::int64_t c = 0; c < s.width; ++c) {
        T& entry = (*matrices.back())[static_cast<std::size_t>(r * s.row_stride + c)];
        entry = round_to<T>(normal(random));
        x.push_back(wide(entry));
      }
    }
    expected.push_back(reference(x, plan.mask, kScale));
    list.data.push_back(matrices.back()->get());
    list.row_strides.push_back(s.row_stride);
  }
  const PreparedFilter prepared(plan, dtype, column_gains);
  const std::size_t bytes = prepared.filter.workspace_bytes(list, nullptr);
  void* workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  prepared.filter.run(list, kScale, workspace, bytes, nullptr);
  std::free(workspace);
  for (std::size_t m = 0; m < 2; ++m) {
    double error = 0.0;
    double norm = 0.0;
    for (std::int64_t r = 0; r < s.height; ++r) {
      for (std::int64_t c = 0; c < s.width; ++c) {
        const double want = expected[m][static_cast<std::size_t>(r * s.width + c)];
        const double got = wide((*matrices[m])[static_cast<std::size_t>(r * s.row_stride + c)]);
        error += (got - want) * (got - want);
        norm += want * want;
      }
    }
    const double relative = std::sqrt(error / norm);
    expect(relative <= tolerance, what, relative);
  }
}

void check_storage(const Plan& plan, const std::vector<float>& column_gains, const Shape& s,
                   const char* what) {
  check_filter<float>(plan, column_gains, s, DType::kFloat32, 1e-6, what);
  check_filter<bfloat16>(plan, column_gains, s, DType::kBFloat16, 4e-3, what);
  check_filter<float16>(plan, column_gains, s, DType::kFloat16, 5e-4, what);
}

void check_three_kernels() {
  struct Case {
    Shape shape;
    int parts;
    int row_chirp = 0;
    int column_chirp = 0;
  };
  // Odd widths and strides, a lone last row, every number of parts, uncommon radices, convolutions.
  for (const Case& c : {Case{{48, 56, 56}, 4}, Case{{63, 45, 48}, 1}, Case{{16, 30, 31}, 8},
                        Case{{86, 33, 33}, 2}, Case{{38, 41, 43}, 2, 84, 40}, Case{{1, 67, 67}, 1, 135, 0}}) {
    const Shape& s = c.shape;
    const double edge = 0.2 * double(std::max(s.height, s.width));
    Plan plan;
    plan.form = Form::kFull;
    plan.mask = high_pass(s, edge);
    plan.tiles = {c.parts, 4, 64, 64, c.row_chirp, c.column_chirp};
    std::vector<float> gains(std::size_t(s.width / 2 + 1), std::nanf(""));
    for (std::size_t i = 0; i < gains.size(); ++i) {
      if (double(i) >= edge) gains[i] = 1.0f;
    }
    check_storage(plan, gains, s, "full in three kernels");
    plan.mask.kind = MaskKind::kButterworth;
    plan.mask.order = 2.0;
    check_filter<float>(plan, std::vector<float>(gains.size(), std::nanf("")), s, DType::kFloat32, 1e-6,
                        "full in three kernels, smooth mask");
  }
}

void check_decimated(const Shape& s, bool nyquist, int taps) {
  Plan plan;
  plan.form = Form::kDecimated;
  plan.mask = high_pass(s, 4.5);
  if (nyquist) {  // a disc around Nyquist
    plan.mask.kind = MaskKind::kOfficial;
    plan.mask.edge0 = 4.0;
    plan.mask.edge1 = -1.0;
  }
  plan.background = nyquist ? 0.0 : 1.0;
  plan.rows = {24, taps, 5, nyquist};
  plan.columns = {30, taps, 5, nyquist};
  check_storage(plan, {}, s, nyquist ? "decimated around Nyquist" : "decimated");
  plan.tiles = {2, 4, 64, 64};
  check_storage(plan, {}, s, "decimated, the grid in three kernels");
  plan.tiles = {};
  plan.columns = {s.width, 0, s.width / 2 + 1, false};
  check_storage(plan, {}, s, "decimated, whole columns axis");
}

void check_filters() {
  const Shape shapes[] = {{48, 56, 56}, {37, 41, 45}, {1, 50, 50}, {33, 64, 70}, {210, 30, 30}, {512, 9, 9}};
  for (const Shape& s : shapes) {
    const double edge = 0.1 * double(std::max(s.height, s.width));
    Plan full;
    full.form = Form::kFull;
    full.mask = high_pass(s, edge);
    check_storage(full, {}, s, "full, columns by cuFFT");
    if (s.height == 37 || s.height == 33) continue;  // prime factors beyond 7
    full.fused = true;
    std::vector<float> gains(std::size_t(s.width / 2 + 1), std::nanf(""));
    check_storage(full, gains, s, "full, fused columns, all of them varying");
    for (std::size_t i = 0; i < gains.size(); ++i) {
      if (double(i) >= edge) gains[i] = 1.0f;
    }
    check_storage(full, gains, s, "full, fused columns, some of them constant");
    full.mask.kind = MaskKind::kButterworth;
    full.mask.order = 2.0;
    check_storage(full, std::vector<float>(gains.size(), std::nanf("")), s,
                  "full, fused columns, smooth mask");
  }
  check_three_kernels();
  for (const bool nyquist : {false, true}) {
    for (const int taps : {7, 10}) {
      // Nyquist of an odd height lies between two bins.
      for (const std::int64_t height : {96, 97}) check_decimated({height, 130, 131}, nyquist, taps);
    }
  }
}

template <typename T>
std::vector<T> random_array(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) value = round_to<T>(normal(random));
  return values;
}

void check_sums() {
  for (const std::size_t n : {1u, 2047u, 5000u}) {
    Buffer<bfloat16> base(random_array<bfloat16>(n, 1));
    std::vector<std::unique_ptr<Buffer<float16>>> models;
    std::vector<Array> arrays;
    std::vector<double> weights;
    for (unsigned m = 0; m < 18; ++m) {
      models.push_back(std::make_unique<Buffer<float16>>(random_array<float16>(n, 2 + m)));
      arrays.push_back({models.back()->get(), DType::kFloat16});
      weights.push_back(0.1 * (m + 1));
    }
    Buffer<float> out(n);
    Buffer<double> means(models.size());
    Buffer<double> scratch(static_cast<std::size_t>(
        accumulate_scratch(static_cast<std::int64_t>(n), static_cast<std::int64_t>(models.size()))));
    accumulate(out.get(), {base.get(), DType::kBFloat16}, arrays, weights, static_cast<std::int64_t>(n),
               means.get(), scratch.get(), nullptr);
    bool same = true;
    for (std::size_t i = 0; i < n; ++i) {
      float sum = 0.0f;
      for (std::size_t m = 0; m < models.size(); ++m) {
        const float product =
            static_cast<float>(weights[m]) * (to_float((*models[m])[i]) - to_float(base[i]));
        sum = m == 0 ? product : sum + product;
      }
      same = same && sum == out[i];
    }
    expect(same, "weighted sum, bit for bit");
    for (std::size_t m = 0; m < models.size(); ++m) {
      double mean = 0.0;
      for (std::size_t i = 0; i < n; ++i) mean += std::fabs(wide((*models[m])[i]) - wide(base[i]));
      expect(std::fabs(means[m] - mean / double(n)) <= 1e-6 * mean / double(n), "mean |v|", means[m]);
    }

    Buffer<float> delta(random_array<float>(n, 99));
    Buffer<float16> rounded(n);
    add_round({rounded.get(), DType::kFloat16}, {base.get(), DType::kBFloat16},
              {delta.get(), DType::kFloat32}, 0.3, 1.7, static_cast<std::int64_t>(n), nullptr);
    bool exact = true;
    for (std::size_t i = 0; i < n; ++i) {
      const float want = to_float(base[i]) + 0.3f * (1.7f * delta[i]);
      exact = exact && round_to<float16>(want).bits == rounded[i].bits;
    }
    expect(exact, "add and round, bit for bit");
  }
}

// Sum and filter at once, against one after the other.
void check_filtered_sum(const Plan& plan, const std::vector<float>& gains, const Shape& s) {
  const auto n = std::size_t(s.height * s.width);
  const PreparedFilter prepared(plan, DType::kFloat32, gains);
  Buffer<bfloat16> base(random_array<bfloat16>(n, 1));
  Buffer<bfloat16> first(random_array<bfloat16>(n, 2));
  Buffer<float> second(random_array<float>(n, 3));
  Buffer<float16> third(random_array<float16>(n, 4));
  const std::vector<Array> models = {
      {first.get(), DType::kBFloat16}, {second.get(), DType::kFloat32}, {third.get(), DType::kFloat16}};
  const std::vector<double> weights = {0.2, -0.5, 0.8};

  const auto run = [&](Buffer<float>& out, const SumFirst* sum, const AddLast* add) {
    const MatrixList list{{out.get()}, {s.width}};
    const std::size_t bytes = prepared.filter.workspace_bytes(list, nullptr, sum);
    void* workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    prepared.filter.run(list, 1.0, workspace, bytes, nullptr, sum);
    if (sum) prepared.filter.run_last(list, workspace, bytes, nullptr, *sum, *add);
    std::free(workspace);
  };
  Buffer<float> want(n);
  Buffer<double> means(models.size());
  Buffer<double> scratch(std::size_t(accumulate_scratch(std::int64_t(n), std::int64_t(models.size()))));
  accumulate(want.get(), {base.get(), DType::kBFloat16}, models, weights, std::int64_t(n), means.get(),
             scratch.get(), nullptr);
  const auto squares = [&](Buffer<float>& x) {
    double sum = 0.0;
    for (std::size_t i = 0; i < n; ++i) sum += wide(x[i]) * wide(x[i]);
    return sum;
  };
  std::vector<double> expected = {means[0], means[1], means[2], squares(want)};
  run(want, nullptr, nullptr);
  expected.push_back(squares(want));

  Buffer<float> got(n);
  Buffer<double> results(expected.size());
  SumFirst sum{{{base.get(), DType::kBFloat16}, {}, {}, int(models.size())}, results.get()};
  for (std::size_t m = 0; m < models.size(); ++m) {
    sum.vectors.models[m] = models[m];
    sum.vectors.weights[m] = static_cast<float>(weights[m]);
  }
  const AddLast nothing{};
  run(got, &sum, &nothing);
  expect(std::memcmp(got.get(), want.get(), n * sizeof(float)) == 0, "filtered sum, bit for bit");
  if (plan.form == Form::kDecimated) results[4] += results[3];  // of the background
  for (std::size_t i = 0; i < expected.size(); ++i)
    expect(std::fabs(results[i] - expected[i]) <= (i < 4 ? 1e-12 : 1e-6) * expected[i], "means and squares",
           results[i]);

  Buffer<float16> merged(n);
  Buffer<float16> merged_at_once(n);
  const AddLast add{{merged_at_once.get(), DType::kFloat16}, {base.get(), DType::kBFloat16}, 0.7f, 1.1f};
  expect(prepared.filter.adds(add) == (s.width % 4 == 0), "whether a base can be added on the way");
  if (!prepared.filter.adds(add)) return;
  run(got, &sum, &add);
  add_round({merged.get(), DType::kFloat16}, add.base, {want.get(), DType::kFloat32}, 0.7, 1.1,
            std::int64_t(n), nullptr);
  expect(std::memcmp(merged_at_once.get(), merged.get(), n * sizeof(float16)) == 0,
         "base added on the way, bit for bit");
}

void check_filtered_sums() {
  for (const std::int64_t width : {265, 264}) {
    const Shape s{75, width, width};  // several chunks and blocks
    Plan plan;
    plan.form = Form::kDecimated;
    plan.mask = high_pass(s, 4.5);
    plan.background = 1.0;
    plan.rows = {24, 7, 5, false};
    plan.columns = {30, 10, 5, false};
    check_filtered_sum(plan, {}, s);
    plan.tiles = {2, 4, 64, 64};
    check_filtered_sum(plan, {}, s);
    Plan full;
    full.form = Form::kFull;
    full.mask = plan.mask;
    full.tiles = {1, 4, 64, 64, width % 4 == 0 ? 0 : 540};
    std::vector<float> gains(std::size_t(width / 2 + 1), 1.0f);
    std::fill_n(gains.begin(), 5, std::nanf(""));
    check_filtered_sum(full, gains, s);
  }
}

void check_selection() {
  const std::size_t rows = 3;
  for (const std::size_t columns : {1u, 255u, 40000u}) {
    for (const std::size_t k : {std::size_t{1}, columns / 100 + 1, columns}) {
      std::vector<float> model = random_array<float>(rows * columns, 5);
      std::vector<bfloat16> base = random_array<bfloat16>(rows * columns, 6);
      for (std::size_t i = 0; i < model.size(); i += 3) model[i] = to_float(base[i]) + 1.5f;  // ties
      for (std::size_t i = columns; i < 2 * columns; ++i)
        model[i] = i % 4 ? to_float(base[i]) : 1.0f;  // many zeros
      std::vector<float> v(model.size());
      for (std::size_t i = 0; i < v.size(); ++i) v[i] = model[i] - to_float(base[i]);
      Buffer<float> device_model(model);
      Buffer<bfloat16> device_base(base);
      Buffer<std::int64_t> indices(rows * k);
      Buffer<float> values(rows * k);
      Buffer<std::int64_t> counts(rows);
      const std::size_t bytes = select_scratch(std::int64_t(rows), std::int64_t(columns));
      void* scratch = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
      select({{device_model.get(), DType::kFloat32},
              {device_base.get(), DType::kBFloat16},
              std::int64_t(rows),
              std::int64_t(columns),
              std::int64_t(k),
              indices.get(),
              values.get(),
              counts.get()},
             scratch, nullptr);
      std::free(scratch);
      for (std::size_t r = 0; r < rows; ++r) {
        std::vector<std::int64_t> order;
        for (std::size_t i = r * columns; i < (r + 1) * columns; ++i) {
          if (v[i] != 0.0f) order.push_back(std::int64_t(i));
        }
        const auto magnitude = [&](std::int64_t i) { return std::fabs(v[std::size_t(i)]); };
        std::stable_sort(order.begin(), order.end(),
                         [&](std::int64_t a, std::int64_t b) { return magnitude(a) > magnitude(b); });
        order.resize(std::min(k, order.size()));
        std::sort(order.begin(), order.end());
        bool same = counts[r] == std::int64_t(order.size());
        for (std::size_t i = 0; same && i < order.size(); ++i)
          same = indices[r * k + i] == order[i] && values[r * k + i] == v[std::size_t(order[i])];
        expect(same, "selection", double(columns));
      }
    }
  }
}

void check_sparse() {
  const std::vector<bfloat16> before = random_array<bfloat16>(1000, 11);
  const std::vector<float> before_wide = random_array<float>(5000, 12);
  Buffer<bfloat16> weights(before);
  Buffer<float> wide_weights(before_wide);
  Buffer<std::int64_t> indices(std::vector<std::int64_t>{3, 500, 999});
  Buffer<std::int32_t> narrow_indices(std::vector<std::int32_t>{3, 500, 999});
  std::vector<std::int32_t> most(4900);
  std::iota(most.begin(), most.end(), 50);
  Buffer<std::int32_t> most_indices(most);
  Buffer<float> values(std::vector<float>{1.0f, -2.0f, 0.5f});
  Buffer<float> most_values(random_array<float>(most.size(), 13));
  Buffer<bfloat16> origin(std::vector<bfloat16>(3, round_to<bfloat16>(3.0f)));
  // The first two share a launch; the third works on the memory of the first.
  const SparseSwitch expert({
      {weights.get(), DType::kBFloat16, 1000, {indices.get(), true, 3}, values.get(), 2.0, nullptr},
      {wide_weights.get(),
       DType::kFloat32,
       5000,
       {most_indices.get(), false, 4900},
       most_values.get(),
       0.5,
       nullptr},
      {weights.get(),
       DType::kBFloat16,
       1000,
       {narrow_indices.get(), false, 2},
       values.get(),
       1.0,
       origin.get()},
  });
  expect(expert.launches() == 2, "two launches");
  Buffer<char> saved(static_cast<std::size_t>(expert.saved_bytes()));
  expert.apply(saved.get(), nullptr);
  expect(weights[999].bits == round_to<bfloat16>(to_float(before[999]) + 1.0f).bits, "sparse add");
  expect(to_float(weights[3]) == 4.0f, "sparse replace");
  expect(wide_weights[49] == before_wide[49], "sparse beside its entries");
  expect(wide_weights[4949] == before_wide[4949] + 0.5f * most_values[4899], "sparse add, many blocks");
  expert.restore(saved.get(), nullptr);
  bool same = true;
  for (std::size_t i = 0; i < before.size(); ++i) same = same && weights[i].bits == before[i].bits;
  for (std::size_t i = 0; i < before_wide.size(); ++i) same = same && wide_weights[i] == before_wide[i];
  expect(same, "undo, bit for bit");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  setenv("FREEMERGE_CUFFT", argv[1], 1);
  for (const emulation::Order order :
       {emulation::Order::kForward, emulation::Order::kReverse, emulation::Order::kRandom}) {
    emulation::set_order(order);
    check_filters();
    check_sums();
    check_filtered_sums();
    check_selection();
    check_sparse();
  }
  if (failures == 0) std::puts("ok");
  return failures != 0;
}
