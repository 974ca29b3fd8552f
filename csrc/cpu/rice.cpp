#include "cpu/rice.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/error.h"

namespace freemerge {
namespace {

constexpr int kMaxParameter = 40;
constexpr int kMaxGroups = 9;  // 63 bits of LEB128

std::uint64_t bytes_for(std::uint64_t bits) { return (bits + 7) / 8; }

// The gaps between ascending positions, computed where they are used: the passes over them are bound by
// memory. The first one checks them and learns what the sizes of the likely codings depend on.
template <typename Index>
class Gaps {
 public:
  using Gap = std::make_unsigned_t<Index>;

  Gaps(const Index* positions, std::int64_t count) : positions_(positions), count_(count) {
    const std::uint64_t mean = count == 0 ? 0
                                          : (static_cast<std::uint64_t>(positions[count - 1]) - size() + 1) /
                                                static_cast<std::uint64_t>(count);
    while (guess_ < std::min(kMaxParameter, kIndexBits - 2) && (mean >> (guess_ + 1)) != 0) ++guess_;
    const int below = std::max(0, guess_ - 1);
    Gap ones = 0;
    Gap ones_below = 0;
    Gap long_gaps = 0;
    for_each([&](Gap gap) {
      high_ += gap >> (guess_ + 1);
      ones += gap >> guess_ & 1u;
      ones_below += gap >> below & 1u;
      long_gaps += gap >= 128;
      all_ |= gap;
    });
    ones_ = ones;
    ones_below_ = ones_below;
    long_gaps_ = long_gaps;
    bool ascending = count == 0 || positions[0] >= 0;
    for (std::int64_t i = 1; i < count; ++i) ascending &= positions[i] > positions[i - 1];
    require(ascending, "positions must be strictly ascending and not negative");
  }

  std::uint64_t size() const { return static_cast<std::uint64_t>(count_); }

  // The parameter of about the least size: floor(log2(mean gap)).
  int guess() const { return guess_; }

  std::uint64_t quotient_sum(int parameter) const {
    if (parameter == guess_ + 1) return high_;
    if (parameter == guess_) return 2 * high_ + ones_;
    if (parameter == guess_ - 1) return 4 * high_ + 2 * ones_ + ones_below_;
    std::uint64_t sum = 0;
    if (parameter < kIndexBits) for_each([&](Gap gap) { sum += gap >> parameter; });
    return sum;
  }

  // Bytes of all gaps at seven bits a byte.
  std::uint64_t byte_size() const {
    std::uint64_t bytes = size() + long_gaps_;
    for (int bits = 14; bits < kIndexBits && all_ >> bits != 0; bits += 7) {
      for_each([&](Gap gap) { bytes += gap >> bits != 0; });
    }
    return bytes;
  }

  Gap operator[](std::int64_t i) const {
    const Gap before = i == 0 ? static_cast<Gap>(-1) : static_cast<Gap>(positions_[i - 1]);
    return static_cast<Gap>(static_cast<Gap>(positions_[i]) - before - 1);
  }

  template <typename Visit>
  void for_each(const Visit& visit) const {
    if (count_ > 0) visit((*this)[0]);
    for (std::int64_t i = 1; i < count_; ++i) visit((*this)[i]);
  }

 private:
  static constexpr int kIndexBits = 8 * static_cast<int>(sizeof(Index));

  const Index* positions_;
  std::int64_t count_;
  int guess_ = 0;
  std::uint64_t high_ = 0;        // sum of the quotients at guess + 1
  std::uint64_t ones_ = 0;        // gaps with bit `guess` set
  std::uint64_t ones_below_ = 0;  // and with the one below
  std::uint64_t long_gaps_ = 0;   // gaps of more than seven bits
  Gap all_ = 0;                   // the bits of all gaps
};

struct RiceCode {
  int parameter;
  std::uint64_t quotients;  // their sum
  std::uint64_t bits;
};

template <typename Index>
RiceCode rice_code(const Gaps<Index>& gaps, int parameter) {
  const std::uint64_t quotients = gaps.quotient_sum(parameter);
  return {parameter, quotients, quotients + gaps.size() * static_cast<std::uint64_t>(parameter + 1)};
}

// The code of least size with the smallest parameter. The size is convex in the parameter, so walking
// downhill from a guess finds it.
template <typename Index>
RiceCode best_code(const Gaps<Index>& gaps) {
  const int guess = gaps.guess();
  RiceCode best = rice_code(gaps, guess);
  for (int next = guess - 1; next >= 0; --next) {
    const RiceCode code = rice_code(gaps, next);
    if (code.bits > best.bits) break;
    best = code;
  }
  if (best.parameter < guess) return best;
  for (int next = guess + 1; next <= kMaxParameter; ++next) {
    const RiceCode code = rice_code(gaps, next);
    if (code.bits >= best.bits) break;
    best = code;
  }
  return best;
}

// Appends bits, least significant first. Without branches: whole words are written, each over the unfinished
// byte of the last, so up to seven bytes beyond the last bit are touched.
class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* bytes) : out_(bytes) {}

  // value < 2^width, width <= 56
  void put(std::uint64_t value, unsigned width) {
    pending_ |= value << bits_;
    bits_ += width;
    std::memcpy(out_, &pending_, sizeof pending_);
    out_ += bits_ / 8;
    pending_ >>= bits_ / 8 * 8;
    bits_ %= 8;
  }

 private:
  std::uint8_t* out_;
  std::uint64_t pending_ = 0;
  unsigned bits_ = 0;
};

// Sets bits of zeroed bytes, at ascending places. Whole words are written, the last one by flush().
class BitSetter {
 public:
  explicit BitSetter(std::uint8_t* bytes) : bytes_(bytes) {}

  void set(std::uint64_t place) {
    if (place / 64 != word_) {
      flush();
      word_ = place / 64;
      pending_ = 0;
    }
    pending_ |= std::uint64_t{1} << (place % 64);
  }

  void flush() { std::memcpy(bytes_ + 8 * word_, &pending_, sizeof pending_); }

 private:
  std::uint8_t* bytes_;
  std::uint64_t word_ = 0;
  std::uint64_t pending_ = 0;
};

constexpr int kTogether = 4;       // remainders that are put at once
constexpr unsigned kNarrow = 14;   // bits, at most, so that they fit
constexpr std::size_t kSlack = 8;  // bytes that either may touch beyond its last bit

// All remainders, `parameter` bits each, then all quotients in unary: zeros ended by a one. Least significant
// bit first; each of the two streams fills whole bytes.
template <typename Index>
std::vector<std::uint8_t> write_rice(const Gaps<Index>& gaps, const RiceCode& code) {
  const auto width = static_cast<unsigned>(code.parameter);
  const std::uint64_t remainder_bytes = bytes_for(gaps.size() * width);
  const std::uint64_t unary_bytes = bytes_for(code.quotients + gaps.size());
  std::vector<std::uint8_t> bytes(remainder_bytes + kSlack + unary_bytes + kSlack);
  std::uint8_t* const unary_start = bytes.data() + remainder_bytes + kSlack;
  const std::uint64_t mask = (std::uint64_t{1} << width) - 1;
  BitWriter remainders(bytes.data());
  BitSetter ends(unary_start);
  std::uint64_t place = 0;
  const auto remainder = [&](std::uint64_t gap) {
    place += gap >> width;
    ends.set(place++);
    return gap & mask;
  };
  const auto count = static_cast<std::int64_t>(gaps.size());
  std::int64_t i = 0;
  const std::int64_t alone = width <= kNarrow ? 1 : count;
  for (; i < std::min(alone, count); ++i) remainders.put(remainder(gaps[i]), width);
  for (; i + kTogether <= count; i += kTogether) {
    std::uint64_t together = remainder(gaps[i]);
    together |= remainder(gaps[i + 1]) << width;
    together |= remainder(gaps[i + 2]) << (2 * width);
    together |= remainder(gaps[i + 3]) << (3 * width);
    remainders.put(together, kTogether * width);
  }
  for (; i < count; ++i) remainders.put(remainder(gaps[i]), width);
  ends.flush();
  std::memmove(bytes.data() + remainder_bytes, unary_start, unary_bytes);
  bytes.resize(remainder_bytes + unary_bytes);
  return bytes;
}

// Each gap in LEB128: seven bits a byte, least significant first, the high bit set on all but the last.
template <typename Index>
std::vector<std::uint8_t> write_byte_gaps(const Gaps<Index>& gaps, std::uint64_t size) {
  std::vector<std::uint8_t> bytes;
  bytes.reserve(size);
  gaps.for_each([&](std::uint64_t gap) {
    for (; gap >= 128; gap >>= 7) bytes.push_back(static_cast<std::uint8_t>(gap | 128u));
    bytes.push_back(static_cast<std::uint8_t>(gap));
  });
  return bytes;
}

// The eight bytes at `at`, or as many as there are.
inline std::uint64_t load_word(const std::uint8_t* bytes, std::size_t size, std::size_t at) {
  std::uint64_t word = 0;
  if (at + 8 <= size) {
    std::memcpy(&word, bytes + at, 8);
  } else if (at < size) {
    std::memcpy(&word, bytes + at, size - at);
  }
  return word;
}

template <typename Index>
void read_rice(int parameter, const std::uint8_t* bytes, std::size_t size, std::int64_t count, std::int64_t n,
               Index* out) {
  require(parameter >= 0 && parameter <= kMaxParameter, "the Rice parameter is out of range");
  require(static_cast<std::uint64_t>(count) <= 8 * static_cast<std::uint64_t>(size),
          "the positions end early");
  const std::uint64_t remainder_bits =
      static_cast<std::uint64_t>(count) * static_cast<std::uint64_t>(parameter);
  const std::uint64_t remainder_bytes = bytes_for(remainder_bits);
  require(remainder_bytes <= size, "the positions end early");
  if (remainder_bits % 8 != 0) {
    require(bytes[remainder_bytes - 1] >> (remainder_bits % 8) == 0, "the remainders end in stray bits");
  }
  const std::uint8_t* unary = bytes + remainder_bytes;
  const std::size_t unary_size = size - remainder_bytes;
  const std::uint64_t mask = (std::uint64_t{1} << parameter) - 1;
  const std::uint64_t limit = static_cast<std::uint64_t>(n) >> parameter;
  std::uint64_t remainders = 0;
  std::uint64_t entry = 0;
  std::uint64_t used_bits = 0;
  for (std::size_t at = 0; at < unary_size; at += 8) {
    for (std::uint64_t word = load_word(unary, unary_size, at); word != 0; word &= word - 1) {
      const std::uint64_t place = 8 * at + static_cast<std::uint64_t>(__builtin_ctzll(word));
      require(entry < static_cast<std::uint64_t>(count), "more positions than announced");
      const std::uint64_t bit = entry * static_cast<std::uint64_t>(parameter);
      remainders += load_word(bytes, size, bit / 8) >> (bit % 8) & mask;
      const std::uint64_t quotients = place - entry;
      const std::uint64_t position = (quotients << parameter) + remainders + entry;
      require(quotients <= limit && position < static_cast<std::uint64_t>(n),
              "a position lies outside the tensor");
      out[entry] = static_cast<Index>(position);
      ++entry;
      used_bits = place + 1;
    }
  }
  require(entry == static_cast<std::uint64_t>(count), "fewer positions than announced");
  require(bytes_for(used_bits) == unary_size, "the positions end in stray bytes");
}

template <typename Index>
void read_byte_gaps(const std::uint8_t* bytes, std::size_t size, std::int64_t count, std::int64_t n,
                    Index* out) {
  std::size_t at = 0;
  std::uint64_t next = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t gap = 0;
    int group = 0;
    std::uint8_t byte = 128;
    for (; byte >= 128; ++group) {
      require(at < size, "the positions end early");
      require(group < kMaxGroups, "a gap between positions is too long");
      byte = bytes[at++];
      gap |= static_cast<std::uint64_t>(byte & 127u) << (7 * group);
    }
    require(group == 1 || byte != 0, "a gap between positions is not in its shortest form");
    require(gap < static_cast<std::uint64_t>(n) && next + gap < static_cast<std::uint64_t>(n),
            "a position lies outside the tensor");
    out[i] = static_cast<Index>(next + gap);
    next += gap + 1;
  }
  require(at == size, "the positions end in stray bytes");
}

template <typename Index>
void decode(PositionCoding coding, int parameter, const std::uint8_t* bytes, std::size_t size,
            std::int64_t count, std::int64_t n, Index* out) {
  switch (coding) {
    case PositionCoding::kRice:
      return read_rice(parameter, bytes, size, count, n, out);
    case PositionCoding::kBytes:
      require(parameter == 0, "byte gaps take no parameter");
      return read_byte_gaps(bytes, size, count, n, out);
  }
  throw std::invalid_argument("unknown coding of positions");
}

template <typename Index>
CodedPositions encode(const Index* positions, std::int64_t count) {
  const Gaps<Index> gaps(positions, count);
  const RiceCode code = best_code(gaps);
  const std::uint64_t byte_size = gaps.byte_size();
  const std::uint64_t rice_size = bytes_for(gaps.size() * static_cast<std::uint64_t>(code.parameter)) +
                                  bytes_for(code.quotients + gaps.size());
  if (byte_size < rice_size) return {PositionCoding::kBytes, 0, write_byte_gaps(gaps, byte_size)};
  return {PositionCoding::kRice, code.parameter, write_rice(gaps, code)};
}

}  // namespace

CodedPositions encode_positions(Indices positions) {
  if (positions.wide) return encode(static_cast<const std::int64_t*>(positions.data), positions.count);
  return encode(static_cast<const std::int32_t*>(positions.data), positions.count);
}

void decode_positions(PositionCoding coding, int parameter, const std::uint8_t* bytes, std::size_t size,
                      std::int64_t count, std::int64_t n, void* out, bool wide) {
  require(count >= 0 && n >= 0 && count <= n, "the number of positions is out of range");
  if (wide) {
    decode(coding, parameter, bytes, size, count, n, static_cast<std::int64_t*>(out));
  } else {
    require(n <= std::int64_t{1} << 31, "the tensor is too large for 32-bit positions");
    decode(coding, parameter, bytes, size, count, n, static_cast<std::int32_t*>(out));
  }
}

}  // namespace freemerge
