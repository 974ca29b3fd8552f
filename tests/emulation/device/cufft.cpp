// A stand-in for libcufft on the CPU: the calls freemerge makes, any length, double precision inside.
// It is stricter than the real library: it wants a work area and fills it with NaN, destroys the input of
// complex-to-real transforms, and refuses layouts, alignments and sequences of calls that the real one may
// survive.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace {

using Complex = std::complex<double>;
using Signal = std::vector<Complex>;
using Index = long long;

constexpr double kPi = 3.141592653589793238462643383279502884;
constexpr Index kLargestDirectPrime = 61;

enum Result {
  kSuccess = 0,
  kInvalidPlan = 1,
  kInvalidType = 3,
  kInvalidValue = 4,
  kExecFailed = 6,
  kInvalidSize = 8,
  kUnalignedData = 9
};
enum Type { kC2C = 0x29, kR2C = 0x2a, kC2R = 0x2c };

Index smallest_factor(Index n) {
  for (Index p = 2; p * p <= n; ++p) {
    if (n % p == 0) return p;
  }
  return n;
}

// Transforms of any length: mixed radix, Bluestein where a prime factor is large.
class Transform {
 public:
  static const Transform& of(Index n) {  // the caller holds the mutex
    static std::map<Index, std::unique_ptr<Transform>> made;
    std::unique_ptr<Transform>& transform = made[n];
    if (!transform) transform = std::make_unique<Transform>(n);
    return *transform;
  }

  explicit Transform(Index n) : n_(n), roots_(static_cast<std::size_t>(n)) {
    for (Index i = 0; i < n; ++i) roots_[at(i)] = std::polar(1.0, -2.0 * kPi * double(i) / double(n));
    Index rest = n;
    Index largest = 1;
    while (rest > 1) {
      largest = std::max(largest, smallest_factor(rest));
      rest /= smallest_factor(rest);
    }
    if (largest > kLargestDirectPrime) prepare_bluestein();
  }

  void run(Signal& x, bool inverse) const {
    if (inverse) conjugate(x);
    if (padded_ > 0) {
      bluestein(x);
    } else {
      Signal out(x.size());
      Signal scratch(x.size());
      recurse(x.data(), 1, out.data(), scratch.data(), n_);
      x.swap(out);
    }
    if (inverse) conjugate(x);
  }

 private:
  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }

  static void conjugate(Signal& x) {
    for (Complex& v : x) v = std::conj(v);
  }

  void recurse(const Complex* in, Index stride, Complex* out, Complex* scratch, Index m) const {
    if (m == 1) {
      *out = *in;
      return;
    }
    const Index p = smallest_factor(m);
    const Index q = m / p;
    for (Index j = 0; j < p; ++j) recurse(in + j * stride, stride * p, scratch + j * q, out + j * q, q);
    if (p == 2) {
      for (Index k = 0; k < q; ++k) {
        const Complex odd = scratch[q + k] * roots_[at(n_ / m * k)];
        out[k] = scratch[k] + odd;
        out[q + k] = scratch[k] - odd;
      }
      return;
    }
    Complex term[kLargestDirectPrime];
    for (Index k = 0; k < q; ++k) {
      for (Index j = 0; j < p; ++j) term[j] = scratch[j * q + k] * roots_[at(n_ / m * j * k)];
      for (Index r = 0; r < p; ++r) {
        Complex sum = term[0];
        for (Index j = 1; j < p; ++j) sum += term[j] * roots_[at(j * r % p * (n_ / p))];
        out[k + r * q] = sum;
      }
    }
  }

  void prepare_bluestein() {
    padded_ = 1;
    while (padded_ < 2 * n_ - 1) padded_ *= 2;
    chirp_.resize(at(n_));
    for (Index i = 0; i < n_; ++i) {
      // i * i mod 2n keeps the angle small, hence accurate.
      const auto square =
          static_cast<Index>(static_cast<unsigned __int128>(i) * static_cast<unsigned __int128>(i) %
                             static_cast<unsigned __int128>(2 * n_));
      chirp_[at(i)] = std::polar(1.0, -kPi * double(square) / double(n_));
    }
    kernel_.assign(at(padded_), 0.0);
    for (Index i = 0; i < n_; ++i)
      kernel_[at(i)] = kernel_[at((padded_ - i) % padded_)] = std::conj(chirp_[at(i)]);
    Transform::of(padded_).run(kernel_, false);
  }

  void bluestein(Signal& x) const {
    const Transform& power_of_two = Transform::of(padded_);
    Signal y(at(padded_));
    for (Index i = 0; i < n_; ++i) y[at(i)] = x[at(i)] * chirp_[at(i)];
    power_of_two.run(y, false);
    for (Index i = 0; i < padded_; ++i) y[at(i)] *= kernel_[at(i)];
    power_of_two.run(y, true);
    for (Index i = 0; i < n_; ++i) x[at(i)] = y[at(i)] * chirp_[at(i)] / double(padded_);
  }

  Index n_;
  std::vector<Complex> roots_;
  Index padded_ = 0;
  Signal chirp_;
  Signal kernel_;
};

// One side of a plan, as cufftMakePlanMany64 takes it.
struct Layout {
  std::vector<Index> embed;
  Index stride = 1;
  Index distance = 0;

  // Element index of row `row` (all leading axes flattened over `n`) of transform `batch`.
  Index row_start(const std::vector<Index>& n, Index batch, Index row) const {
    Index offset = 0;
    Index pitch = embed.back();
    for (std::size_t d = n.size() - 1; d-- > 0;) {
      offset += row % n[d] * pitch;
      row /= n[d];
      pitch *= embed[d];
    }
    return batch * distance + offset * stride;
  }
};

struct Plan {
  bool made = false;
  bool auto_allocation = true;
  int type = 0;
  std::vector<Index> n;
  Layout in;
  Layout out;
  Index batch = 0;
  std::size_t work_size = 0;
  void* work = nullptr;
};

std::mutex mutex;
std::map<int, Plan> plans;
int next_handle = 1;
std::uint64_t bytes_read = 0;
std::uint64_t bytes_written = 0;

Index product(const std::vector<Index>& v) {
  Index p = 1;
  for (const Index x : v) p *= x;
  return p;
}

int make(int handle, int rank, const Index* n, const Index* inembed, Index istride, Index idist,
         const Index* onembed, Index ostride, Index odist, int type, Index batch, std::size_t* work_size) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(handle);
  if (found == plans.end() || found->second.made) return kInvalidPlan;
  if (rank < 1 || rank > 3 || batch < 1 || !n || !work_size) return kInvalidValue;
  if (type != kC2C && type != kR2C && type != kC2R) return kInvalidType;
  if (!inembed || !onembed) return kInvalidValue;  // the real one would silently ignore every stride
  Plan plan = found->second;
  plan.n.assign(n, n + rank);
  if (std::any_of(plan.n.begin(), plan.n.end(), [](Index v) { return v < 1; })) return kInvalidSize;
  std::vector<Index> half = plan.n;
  half.back() = half.back() / 2 + 1;
  const std::vector<Index>& in_shape = type == kC2R ? half : plan.n;
  const std::vector<Index>& out_shape = type == kR2C ? half : plan.n;
  plan.in = {{inembed, inembed + rank}, istride, idist};
  plan.out = {{onembed, onembed + rank}, ostride, odist};
  for (int d = 1; d < rank; ++d) {
    const auto i = static_cast<std::size_t>(d);
    if (plan.in.embed[i] < in_shape[i] || plan.out.embed[i] < out_shape[i]) return kInvalidValue;
  }
  if (istride < 1 || ostride < 1 || (batch > 1 && (idist < 1 || odist < 1))) return kInvalidValue;
  if (rank == 1 && batch > 1 && istride == 1 && (idist < in_shape[0] || odist < out_shape[0]))
    return kInvalidValue;
  plan.type = type;
  plan.batch = batch;
  Index longest = 1;
  for (const Index length : plan.n) longest = std::max(longest, length);
  const bool bluestein = smallest_factor(longest) == longest && longest > 127;
  // An odd batch wants more than the even one after it: cuFFT promises no order.
  plan.work_size =
      static_cast<std::size_t>(product(half) * batch * (bluestein ? 32 : 8) * (batch % 2 ? 2 : 1));
  *work_size = plan.work_size;
  plan.made = true;
  found->second = plan;
  return kSuccess;
}

// All transforms of one batch entry on a dense array; the half spectrum sits in the first half of each row.
void transform_columns(const Plan& plan, Signal& data, bool inverse) {
  const Index row_length = plan.n.back();
  Index pitch = row_length;
  const Index total = product(plan.n);
  const Index columns = plan.type == kC2C ? row_length : row_length / 2 + 1;
  for (std::size_t d = plan.n.size() - 1; d-- > 0;) {
    const Index length = plan.n[d];
    const Transform& transform = Transform::of(length);
    Signal line(static_cast<std::size_t>(length));
    for (Index outer = 0; outer < total; outer += pitch * length) {
      for (Index inner = 0; inner < pitch; ++inner) {
        if (inner % row_length >= columns) continue;
        for (Index i = 0; i < length; ++i)
          line[std::size_t(i)] = data[std::size_t(outer + inner + i * pitch)];
        transform.run(line, inverse);
        for (Index i = 0; i < length; ++i)
          data[std::size_t(outer + inner + i * pitch)] = line[std::size_t(i)];
      }
    }
    pitch *= length;
  }
}

void transform_rows(const Plan& plan, Signal& data, bool inverse) {
  const auto length = static_cast<std::size_t>(plan.n.back());
  const Transform& transform = Transform::of(plan.n.back());
  Signal line(length);
  for (std::size_t start = 0; start < data.size(); start += length) {
    std::copy_n(data.begin() + static_cast<std::ptrdiff_t>(start), length, line.begin());
    transform.run(line, inverse);
    std::copy(line.begin(), line.end(), data.begin() + static_cast<std::ptrdiff_t>(start));
  }
}

Complex get(const float* data, Index element) {
  return {double(data[2 * element]), double(data[2 * element + 1])};
}

void put(float* data, Index element, Complex value) {
  data[2 * element] = static_cast<float>(value.real());
  data[2 * element + 1] = static_cast<float>(value.imag());
}

int execute(int handle, float* in, float* out, int type, bool inverse) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(handle);
  if (found == plans.end() || !found->second.made) return kInvalidPlan;
  const Plan& plan = found->second;
  if (plan.type != type || !in || !out) return kInvalidValue;
  if (reinterpret_cast<std::uintptr_t>(in) % 8 || reinterpret_cast<std::uintptr_t>(out) % 8)
    return kUnalignedData;
  if (plan.auto_allocation || (plan.work_size > 0 && !plan.work)) return kExecFailed;  // no work area was set
  std::memset(plan.work, 0xff, plan.work_size);

  const Index length = plan.n.back();
  const Index half = length / 2 + 1;
  const Index rows = product(plan.n) / length;
  Signal data(static_cast<std::size_t>(rows * length));
  const auto each = [&](const Layout& layout, Index batch, Index count, auto&& visit) {
    for (Index row = 0; row < rows; ++row) {
      const Index start = layout.row_start(plan.n, batch, row);
      for (Index k = 0; k < count; ++k) visit(start + k * layout.stride, data[std::size_t(row * length + k)]);
    }
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Reading every batch entry first shows in-place layouts whose entries overlap.
  std::vector<Signal> all;
  for (Index b = 0; b < plan.batch; ++b) {
    std::fill(data.begin(), data.end(), 0.0);
    if (type == kR2C) {
      each(plan.in, b, length, [&](Index i, Complex& v) { v = double(in[i]); });
      bytes_read += std::uint64_t(rows * length) * 4;
    } else {
      const Index count = type == kC2R ? half : length;
      each(plan.in, b, count, [&](Index i, Complex& v) {
        v = get(in, i);
        if (type == kC2R) put(in, i, {double(nan), double(nan)});
      });
      bytes_read += std::uint64_t(rows * count) * 8;
    }
    all.push_back(data);
  }
  for (Index b = 0; b < plan.batch; ++b) {
    data.swap(all[std::size_t(b)]);
    if (type == kR2C) {
      transform_rows(plan, data, false);
      transform_columns(plan, data, false);
      each(plan.out, b, half, [&](Index i, Complex& v) { put(out, i, v); });
      bytes_written += std::uint64_t(rows * half) * 8;
    } else if (type == kC2C) {
      transform_rows(plan, data, inverse);
      transform_columns(plan, data, inverse);
      each(plan.out, b, length, [&](Index i, Complex& v) { put(out, i, v); });
      bytes_written += std::uint64_t(rows * length) * 8;
    } else {
      transform_columns(plan, data, true);
      for (Index row = 0; row < rows; ++row) {
        Complex* line = &data[std::size_t(row * length)];
        line[0] = line[0].real();
        if (length % 2 == 0) line[length / 2] = line[length / 2].real();
        for (Index k = half; k < length; ++k) line[k] = std::conj(line[length - k]);
      }
      transform_rows(plan, data, true);
      each(plan.out, b, length, [&](Index i, Complex& v) { out[i] = static_cast<float>(v.real()); });
      bytes_written += std::uint64_t(rows * length) * 4;
    }
  }
  return kSuccess;
}

template <typename Change>
int change(int handle, Change&& apply) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(handle);
  if (found == plans.end()) return kInvalidPlan;
  apply(found->second);
  return kSuccess;
}

}  // namespace

#define FM_EXPORT extern "C" __attribute__((visibility("default")))

FM_EXPORT int cufftCreate(int* handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  *handle = next_handle++;
  plans[*handle] = Plan{};
  return kSuccess;
}

FM_EXPORT int cufftDestroy(int handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  return plans.erase(handle) ? kSuccess : kInvalidPlan;
}

FM_EXPORT int cufftSetAutoAllocation(int handle, int enabled) {
  return change(handle, [&](Plan& plan) { plan.auto_allocation = enabled != 0; });
}

FM_EXPORT int cufftSetWorkArea(int handle, void* work) {
  return change(handle, [&](Plan& plan) { plan.work = work; });
}

FM_EXPORT int cufftSetStream(int handle, void*) {
  return change(handle, [](Plan&) {});
}

FM_EXPORT int cufftMakePlanMany64(int handle, int rank, Index* n, Index* inembed, Index istride, Index idist,
                                  Index* onembed, Index ostride, Index odist, int type, Index batch,
                                  std::size_t* work_size) {
  return make(handle, rank, n, inembed, istride, idist, onembed, ostride, odist, type, batch, work_size);
}

FM_EXPORT int cufftExecR2C(int handle, float* in, void* out) {
  return execute(handle, in, static_cast<float*>(out), kR2C, false);
}

FM_EXPORT int cufftExecC2R(int handle, void* in, float* out) {
  return execute(handle, static_cast<float*>(in), out, kC2R, true);
}

FM_EXPORT int cufftExecC2C(int handle, void* in, void* out, int direction) {
  return execute(handle, static_cast<float*>(in), static_cast<float*>(out), kC2C, direction > 0);
}

FM_EXPORT int cufftGetVersion(int* version) {
  *version = 12000;
  return kSuccess;
}

// For tests: what the transforms read and wrote since the last call, and how many plans are alive.
FM_EXPORT void freemerge_standin_traffic(std::uint64_t* read, std::uint64_t* written) {
  const std::lock_guard<std::mutex> lock(mutex);
  *read = bytes_read;
  *written = bytes_written;
  bytes_read = bytes_written = 0;
}

FM_EXPORT int freemerge_standin_plans() {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(plans.size());
}
