#include "cpu/line_fft.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/bytes.h"

namespace freemerge {
namespace {

constexpr std::int64_t kMostBytes = 96
                                    << 10;  // of a line and its bins; beyond, a batch in two levels is faster

constexpr int kFewest = 9;  // vectors that are worth the overhead of a line

constexpr double kPi = 3.14159265358979323846264338327950288;

template <typename T>
T cosine(std::int64_t numerator, std::int64_t denominator) {
  return static_cast<T>(
      std::cos(2 * kPi * static_cast<double>(numerator) / static_cast<double>(denominator)));
}
template <typename T>
T sine(std::int64_t numerator, std::int64_t denominator) {
  return static_cast<T>(
      std::sin(2 * kPi * static_cast<double>(numerator) / static_cast<double>(denominator)));
}

}  // namespace

template <typename T>
std::shared_ptr<const LineFft<T>> LineFft<T>::make(std::int64_t n, int lanes) {
  if (n % lanes != 0 || n < lanes * std::max(lanes, kFewest) ||
      4 * n * static_cast<std::int64_t>(sizeof(T)) > kMostBytes)
    return nullptr;
  Fft<T> columns = Fft<T>::in_order(n / lanes);
  if (columns.method != Fft<T>::Method::kDirect) return nullptr;
  return std::shared_ptr<const LineFft>(new LineFft(n, lanes, std::move(columns)));
}

template <typename T>
LineFft<T>::LineFft(std::int64_t length, int lanes, Fft<T> column_fft)
    : n(length),
      columns(std::move(column_fft)),
      bins_size(std::max(2 * lanes * columns.work, 2 * n)),
      lanes_(lanes) {
  for (std::int64_t group = 0; group < columns.n; group += lanes) {
    const std::int64_t first = std::min<std::int64_t>(group, columns.n - lanes);
    for (int lane = 1; lane < lanes; ++lane) {
      for (int i = 0; i < lanes; ++i) twiddle_storage_.push_back(cosine<T>(lane * (first + i), n));
      for (int i = 0; i < lanes; ++i) twiddle_storage_.push_back(-sine<T>(lane * (first + i), n));
    }
  }
  for (int j = 0; j < lanes; ++j) {
    root_storage_.push_back(cosine<T>(j, lanes));
    root_storage_.push_back(sine<T>(j, lanes));
  }
  twiddles = twiddle_storage_.data();
  roots = root_storage_.data();
}

template <typename T>
std::int64_t LineFft<T>::work(bool packed) const {
  const std::int64_t blocks = (n + 2 * lanes_ - 1) / (2 * lanes_), rows = 2 * lanes_;
  return 2 * n + bins_size + 2 * lanes_ * (1 + (packed ? blocks * (rows + 1) : 0));
}

template <typename T>
std::int64_t LineFft<T>::nbytes() const {
  return columns.nbytes() + vector_bytes(twiddle_storage_, root_storage_);
}

template class LineFft<float>;
template class LineFft<double>;

}  // namespace freemerge
