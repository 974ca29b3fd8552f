#include "cpu/fft.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <map>

#include "common/bytes.h"
#include "common/error.h"

namespace freemerge {
namespace {

// Beyond this length a direct transform's buffers fall out of the first-level cache.
constexpr std::int64_t kMaxDirect = 144;

// Slots of a spectrum are 32-bit numbers.
constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max();

constexpr double kPi = 3.14159265358979323846264338327950288;

std::vector<int> prime_factors(std::int64_t n) {
  std::vector<int> factors;
  for (std::int64_t p = 2; p * p <= n; p += p == 2 ? 1 : 2) {
    for (; n % p == 0; n /= p) factors.push_back(static_cast<int>(p));
  }
  if (n > 1) factors.push_back(static_cast<int>(n));
  return factors;
}

// Work per element of a direct pass, in vector operations: arithmetic, twiddles, load and store.
double radix_cost(int radix) {
  switch (radix) {
    case 2:
      return 8.5;
    case 3:
      return 10.5;
    case 4:
      return 11;
    case 6:
      return 14.5;
    case 8:
      return 14.5;
    case 9:
      return 19;
    case 10:
      return 17;
    case 12:
      return 16;
    case 16:
      return 19;
    default:
      return radix <= 13 ? 9.5 + radix : 12 + 1.3 * radix;
  }
}

// Radices of a direct transform in the order of its passes, the cheapest choice; none if a prime factor of n
// is too large (or n is 1).
std::vector<int> direct_radices(std::int64_t n) {
  std::vector<int> radices;
  std::int64_t composite = 1;
  for (const int p : prime_factors(n)) {
    if (p > kMaxRadix) return {};
    if (p > 5) {
      radices.push_back(p);
    } else {
      composite *= p;
    }
  }
  std::sort(radices.begin(), radices.end(), std::greater<>());

  // The 2, 3, 5 part: cheapest[d] is the best last radix on the way from 1 to its divisor d.
  struct Step {
    double cost;
    int radix;
  };
  std::map<std::int64_t, Step> cheapest{{1, {0, 1}}};
  for (auto step = cheapest.begin(); step != cheapest.end(); ++step) {
    for (const int radix : {2, 3, 4, 5, 6, 8, 9, 10, 12, 16}) {
      const std::int64_t next = step->first * radix;
      if (composite % next != 0) continue;
      const double cost = step->second.cost + radix_cost(radix);
      const auto known = cheapest.find(next);
      if (known == cheapest.end() || cost < known->second.cost) cheapest[next] = {cost, radix};
    }
  }
  for (std::int64_t left = composite; left > 1; left /= cheapest[left].radix) {
    radices.push_back(cheapest[left].radix);
  }
  return radices;
}

double direct_cost(const std::vector<int>& radices) {
  double cost = 0;
  for (const int radix : radices) cost += radix_cost(radix);
  return cost;
}

// The cheapest length of at least `least` without large prime factors.
std::int64_t convolution_length(std::int64_t least) {
  std::int64_t best = 0;
  double best_cost = std::numeric_limits<double>::infinity();
  for (std::int64_t sevens = 1; sevens <= 7; sevens *= 7) {
    for (std::int64_t fives = sevens; fives < 2 * least; fives *= 5) {
      for (std::int64_t threes = fives; threes < 2 * least; threes *= 3) {
        std::int64_t length = threes;
        while (length < least) length *= 2;
        const double cost = static_cast<double>(length) * direct_cost(direct_radices(length));
        if (cost < best_cost) {
          best_cost = cost;
          best = length;
        }
      }
    }
  }
  return best;
}

// Work per element of a transform in natural order.
double ordered_cost(std::int64_t n) {
  const std::vector<int> radices = direct_radices(n);
  if (!radices.empty() || n == 1) {
    return direct_cost(radices) * (n > kMaxDirect ? 2 : 1);
  }
  const std::int64_t m = convolution_length(2 * n - 1);
  return (2 * direct_cost(direct_radices(m)) + 6) * static_cast<double>(m) / static_cast<double>(n);
}

// All divisors but 1 and n, ascending.
std::vector<std::int64_t> divisors(std::int64_t n) {
  std::vector<std::int64_t> small, large;
  for (std::int64_t d = 2; d * d <= n; ++d) {
    if (n % d != 0) continue;
    small.push_back(d);
    if (d * d != n) large.push_back(n / d);
  }
  small.insert(small.end(), large.rbegin(), large.rend());
  return small;
}

// Row length of the cheapest four-step split, or 0 where no split is better than none.
std::int64_t split_row_length(std::int64_t n) {
  const bool direct = !direct_radices(n).empty() || n == 1;
  if (direct && n <= kMaxDirect) return 0;
  std::int64_t best = 0;
  double best_cost = ordered_cost(n);
  for (const std::int64_t row : divisors(n)) {
    double cost = ordered_cost(row) + ordered_cost(n / row) + 6;
    if (n / row > kColumnsAtOnce) cost += 3;   // kColumnsAtOnce columns fall out of the first-level cache
    if (row % kColumnsAtOnce != 0) cost += 2;  // they are fewer at the end
    if (cost <= best_cost) {  // of equal ones the longest rows, whose columns are fewer elements apart
      best_cost = cost;
      best = row;
    }
  }
  return best;
}

std::complex<double> unit_root(std::int64_t numerator, std::int64_t denominator) {
  const double angle = 2 * kPi * static_cast<double>(numerator) / static_cast<double>(denominator);
  return {std::cos(angle), std::sin(angle)};
}

template <typename T>
void append(std::vector<T>& table, std::complex<double> value) {
  table.push_back(static_cast<T>(value.real()));
  table.push_back(static_cast<T>(value.imag()));
}

// The rotations of a large odd radix (see FftPass::roots).
template <typename T>
void append_rotations(std::vector<T>& table, int radix) {
  const int half = (radix - 1) / 2;
  for (int first = 1; first <= half; first += kRotatedBins) {
    for (int j = 1; j <= half; ++j) {
      for (int bin = first; bin < first + kRotatedBins; ++bin) {
        append(table, unit_root(j * std::min(bin, half) % radix, radix));
      }
    }
  }
}

// exp(-2 pi i k^2 / (2 n)), with the square reduced exactly.
std::complex<double> chirp_value(std::int64_t k, std::int64_t n) {
  return unit_root(-(k * k % (2 * n)), 2 * n);
}

// Plain double transform of a smooth length, for tables only: out[k] = sum_j in[j] exp(-2 pi i j k / n).
class ReferenceTransform {
 public:
  explicit ReferenceTransform(std::int64_t n) : n_(n), factors_(prime_factors(n)) {
    roots_.reserve(static_cast<std::size_t>(n));
    for (std::int64_t k = 0; k < n; ++k) roots_.push_back(unit_root(-k, n));
  }

  std::vector<std::complex<double>> operator()(const std::vector<std::complex<double>>& in) const {
    std::vector<std::complex<double>> out(in.size()), parts(in.size());
    transform(in.data(), 1, n_, 0, out.data(), parts.data());
    return out;
  }

 private:
  // Of n samples, `stride` apart; `parts` is room for n.
  void transform(const std::complex<double>* in, std::int64_t stride, std::int64_t n, std::size_t level,
                 std::complex<double>* out, std::complex<double>* parts) const {
    if (n == 1) {
      out[0] = in[0];
      return;
    }
    const std::int64_t radix = factors_[level], length = n / radix;
    for (std::int64_t r = 0; r < radix; ++r) {
      const std::int64_t at = r * length;
      transform(in + r * stride, stride * radix, length, level + 1, parts + at, out + at);
    }
    for (std::int64_t k = 0; k < n; ++k) {
      const std::int64_t step = k * (n_ / n);
      const std::complex<double>* part = parts + k % length;
      double re = part->real(), im = part->imag();
      for (std::int64_t r = 1, turn = step; r < radix; ++r) {
        part += length;
        const std::complex<double> root = roots_[static_cast<std::size_t>(turn)];
        re += part->real() * root.real() - part->imag() * root.imag();
        im += part->real() * root.imag() + part->imag() * root.real();
        turn += step - (turn >= n_ - step ? n_ : 0);
      }
      out[k] = {re, im};
    }
  }

  std::int64_t n_;
  std::vector<int> factors_;
  std::vector<std::complex<double>> roots_;  // exp(-2 pi i k / n)
};

}  // namespace

bool has_transform(std::int64_t n) {
  if (n < 1 || n > kLongest) return false;
  if (n <= kLongest / 4) return true;  // convolutions are less than twice the least length
  const auto fits = [](std::int64_t part) {
    return part == 1 || !direct_radices(part).empty() || convolution_length(2 * part - 1) <= kLongest;
  };
  const std::int64_t row_length = split_row_length(n);
  return row_length == 0 ? fits(n) : fits(row_length) && fits(n / row_length);
}

template <typename T>
Fft<T>::Fft(std::int64_t length) : n(length) {
  require(n >= 1 && n <= kLongest, "transform length must be between 1 and 2147483647");
  if (const std::int64_t row_length = split_row_length(n); row_length != 0) {
    plan_split(row_length);
  } else {
    plan_ordered();
  }
}

template <typename T>
Fft<T>::Fft(std::int64_t length, Ordered) : n(length) {
  plan_ordered();
}

template <typename T>
void Fft<T>::plan_ordered() {
  if (const std::vector<int> radices = direct_radices(n); !radices.empty() || n == 1) {
    plan_direct(radices);
  } else {
    plan_bluestein();
  }
}

template <typename T>
const T* Fft<T>::keep(std::vector<T> table) {
  tables_.push_back(std::move(table));
  return tables_.back().data();
}

template <typename T>
void Fft<T>::plan_direct(const std::vector<int>& radices) {
  method = Method::kDirect;
  work = radices.size() <= 1 ? 0 : radices.size() == 2 ? n : 2 * n;
  std::int64_t left = n, span = 1;
  for (const int radix : radices) {
    const std::int64_t count = left / radix;
    std::vector<T> twiddle_table, root_table;
    if (count > 1) {
      for (std::int64_t p = 0; p < count; ++p) {
        for (int j = 1; j < radix; ++j) append(twiddle_table, unit_root(-(p * j), left));
      }
    }
    if (radix > kMaxUnrolledRadix) {
      append_rotations(root_table, radix);
    } else {
      for (int j = 0; j < radix; ++j) append(root_table, unit_root(j, radix));
    }
    pass_storage_.push_back(
        {radix, count, span, keep(std::move(twiddle_table)), keep(std::move(root_table))});
    left = count;
    span *= radix;
  }
  passes = pass_storage_.data();
  pass_count = static_cast<int>(pass_storage_.size());
}

template <typename T>
void Fft<T>::plan_split(std::int64_t row_length) {
  method = Method::kSplit;
  const std::int64_t column_length = n / row_length;
  const auto child = [this](std::int64_t length) {
    children_.push_back(std::unique_ptr<Fft>(new Fft(length, Ordered{})));
    return children_.back().get();
  };
  rows = child(row_length);
  columns = child(column_length);
  row_pitch = row_length | 1;
  work = std::max(kColumnsAtOnce * (column_length + 1) + columns->work, rows->work);

  std::vector<T> table;
  table.reserve(static_cast<std::size_t>(2 * n));
  for (std::int64_t j1 = 0; j1 < row_length; ++j1) {
    for (std::int64_t k2 = 0; k2 < column_length; ++k2) append(table, unit_root(-(j1 * k2), n));
  }
  twiddles = keep(std::move(table));

  slot_storage_.resize(static_cast<std::size_t>(n));
  for (std::int64_t k = 0; k < n; ++k) {
    slot_storage_[static_cast<std::size_t>(k)] =
        static_cast<std::int32_t>(row_length * (k % column_length) + k / column_length);
  }
  slot = slot_storage_.data();
}

template <typename T>
void Fft<T>::plan_bluestein() {
  method = Method::kBluestein;
  const std::int64_t m = convolution_length(2 * n - 1);
  children_.push_back(std::make_unique<Fft>(m));
  convolution = children_.back().get();
  work = n + m + convolution->work;

  std::vector<T> chirp_table;
  std::vector<std::complex<double>> kernel(static_cast<std::size_t>(m));
  for (std::int64_t k = 0; k < n; ++k) {
    const std::complex<double> value = chirp_value(k, n);
    append(chirp_table, value);
    kernel[static_cast<std::size_t>(k)] = std::conj(value) / static_cast<double>(m);
    kernel[static_cast<std::size_t>(k == 0 ? 0 : m - k)] = std::conj(value) / static_cast<double>(m);
  }
  chirp = keep(std::move(chirp_table));

  const std::vector<std::complex<double>> spectrum = ReferenceTransform(m)(kernel);
  std::vector<T> spectrum_table(static_cast<std::size_t>(2 * m));
  for (std::int64_t k = 0; k < m; ++k) {
    const auto position = static_cast<std::size_t>(2 * (convolution->slot ? convolution->slot[k] : k));
    spectrum_table[position] = static_cast<T>(spectrum[static_cast<std::size_t>(k)].real());
    spectrum_table[position + 1] = static_cast<T>(spectrum[static_cast<std::size_t>(k)].imag());
  }
  chirp_spectrum = keep(std::move(spectrum_table));
}

template <typename T>
std::int64_t Fft<T>::nbytes() const {
  std::int64_t bytes = vector_bytes(pass_storage_, slot_storage_);
  for (const auto& table : tables_) bytes += vector_bytes(table);
  for (const auto& child : children_) bytes += child->nbytes();
  return bytes;
}

template class Fft<float>;
template class Fft<double>;

}  // namespace freemerge
