// Every transform length up to 300, and some larger ones of every kind (none above an argument, if there is
// one), on every instruction set of this processor, against the definition of the DFT in double precision.
#include <complex>
#include <random>

#include "check.h"
#include "cpu/buffer.h"
#include "cpu/kernels.h"
#include "cpu/line_fft.h"

namespace freemerge {
namespace {

using test::check;
using test::relative_error;

std::vector<std::complex<double>> roots_of_unity(std::int64_t n) {
  std::vector<std::complex<double>> roots;
  for (std::int64_t k = 0; k < n; ++k) {
    roots.push_back(std::polar(1.0, -2 * std::acos(-1.0) * static_cast<double>(k) / static_cast<double>(n)));
  }
  return roots;
}

template <typename T>
void test_length(Isa isa, std::int64_t n, double tolerance) {
  const TransformKernels<T>& transform = transform_kernels(kernels(isa), T{});
  const Fft<T> plan(n);
  const int lanes = transform.lanes;
  const std::int64_t size = 2 * lanes * n;
  const std::string name = isa_name(isa) + " length " + std::to_string(n);

  // Guard elements around the data and after the work space must survive.
  constexpr T kGuard = T{12345};
  const std::int64_t margin = 2 * lanes, work_size = plan.work * 2 * lanes;
  Buffer<T> memory(size + 2 * margin), work(work_size + margin);
  T* const data = memory.data() + margin;
  for (std::int64_t i = 0; i < margin; ++i) {
    memory.data()[i] = data[size + i] = work.data()[work_size + i] = kGuard;
  }
  std::mt19937 random(static_cast<unsigned>(n));
  std::normal_distribution<double> normal;
  std::vector<T> input(static_cast<std::size_t>(size));
  for (T& x : input) x = static_cast<T>(normal(random));
  for (std::int64_t i = 0; i < size; ++i) data[i] = input[static_cast<std::size_t>(i)];

  transform.forward(plan, data, work.data());
  const std::vector<std::complex<double>> roots = roots_of_unity(n);
  for (const int lane : {0, lanes - 1}) {
    std::vector<double> found, expected;
    for (std::int64_t k = 0; k < n; k += 1 + n / 512) {
      std::complex<double> sum = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        const T* const element = &input[static_cast<std::size_t>(2 * lanes * j + lane)];
        sum += std::complex<double>(static_cast<double>(element[0]), static_cast<double>(element[lanes])) *
               roots[static_cast<std::size_t>(j * k % n)];
      }
      const T* const element = data + 2 * lanes * (plan.slot != nullptr ? plan.slot[k] : k) + lane;
      expected.insert(expected.end(), {sum.real(), sum.imag()});
      found.insert(found.end(), {static_cast<double>(element[0]), static_cast<double>(element[lanes])});
    }
    check(relative_error(found, expected) < tolerance, name + " forward");
  }

  transform.inverse(plan, data, work.data());
  std::vector<double> round_trip;
  for (std::int64_t i = 0; i < size; ++i) {
    round_trip.push_back(static_cast<double>(data[i]) / static_cast<double>(n));
  }
  check(relative_error(round_trip, input) < tolerance, name + " inverse");
  for (std::int64_t i = 0; i < margin; ++i) {
    check(memory.data()[i] == kGuard && data[size + i] == kGuard && work.data()[work_size + i] == kGuard,
          [&] { return name + " stays within its buffers"; });
  }
}

void test_length_zero() {
  bool refused = false;
  try {
    Fft<float> plan(0);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  check(refused, "length 0 is refused");
}

// Which rows are transformed one line at a time.
void test_lines() {
  const auto made = [](std::int64_t n, int lanes) { return LineFft<float>::make(n, lanes) != nullptr; };
  check(made(768, 16) && made(768, 8) && made(256, 16) && made(4096, 16), "lines");
  check(!made(240, 16), "lines are the square of the lanes long, or longer");
  check(made(72, 8) && !made(64, 8) && made(36, 4) && !made(32, 4), "lines have nine vectors at least");
  check(!made(770, 16), "lines are whole vectors");
  check(!made(16 * 67, 16), "lines have no large prime factor");
  check(!made(8192, 16), "lines are short enough for the caches");
}

}  // namespace
}  // namespace freemerge

int main(int argc, char** argv) {
  using namespace freemerge;
  const std::int64_t longest = argc > 1 ? std::atoi(argv[1]) : 65536;
  test_length_zero();
  test_lines();
  for (const Isa isa : test::available_isas()) {
    std::vector<std::int64_t> lengths;
    for (std::int64_t n = 1; n <= 300; ++n) lengths.push_back(n);
    // Two-level splits, primes, squares and products of primes too large for a direct pass.
    for (const std::int64_t n : {307, 384, 768, 1009, 1024, 1792, 2048, 3000, 4489, 4096, 6901, 8192, 10007,
                                 11008, 13824, 50257, 65536}) {
      if (n <= longest) lengths.push_back(n);
    }
    for (const std::int64_t n : lengths) {
      test_length<float>(isa, n, 6e-7);
      test_length<double>(isa, n, 1e-14);
    }
    std::printf("%s: %zu lengths\n", isa_name(isa).c_str(), lengths.size());
  }
}
