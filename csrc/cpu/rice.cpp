#include "cpu/rice.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace freemerge {
namespace {

constexpr int kMaxParameter = 40;
constexpr int kMaxGroups = 9;  // 63 bits of LEB128

using Gaps = std::vector<std::uint64_t>;

template <typename Index>
Gaps gaps_between(const Index* positions, std::int64_t count) {
  Gaps gaps(static_cast<std::size_t>(count));
  std::int64_t previous = -1;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto position = static_cast<std::int64_t>(positions[i]);
    require(position > previous, "positions must be strictly ascending and not negative");
    gaps[static_cast<std::size_t>(i)] = static_cast<std::uint64_t>(position - previous - 1);
    previous = position;
  }
  return gaps;
}

std::uint64_t bytes_for(std::uint64_t bits) { return (bits + 7) / 8; }

std::uint64_t quotient_sum(const Gaps& gaps, int parameter) {
  std::uint64_t sum = 0;
  for (const std::uint64_t gap : gaps) sum += gap >> parameter;
  return sum;
}

std::uint64_t rice_bits(const Gaps& gaps, int parameter) {
  return quotient_sum(gaps, parameter) + gaps.size() * static_cast<std::uint64_t>(parameter + 1);
}

// The smallest parameter of least size. The size is convex in the parameter, so walking downhill finds it.
int best_parameter(const Gaps& gaps) {
  const std::uint64_t mean = quotient_sum(gaps, 0) / std::max<std::uint64_t>(1, gaps.size());
  int best = 0;
  while (best < kMaxParameter && (mean >> (best + 1)) != 0) ++best;
  std::uint64_t size = rice_bits(gaps, best);
  for (int next = best - 1; next >= 0; --next) {
    const std::uint64_t bits = rice_bits(gaps, next);
    if (bits > size) break;
    best = next;
    size = bits;
  }
  for (int next = best + 1; next <= kMaxParameter; ++next) {
    const std::uint64_t bits = rice_bits(gaps, next);
    if (bits >= size) break;
    best = next;
    size = bits;
  }
  return best;
}

std::uint64_t byte_gap_size(const Gaps& gaps) {
  std::uint64_t size = 0;
  for (const std::uint64_t gap : gaps) {
    for (std::uint64_t rest = gap; rest >= 128; rest >>= 7) ++size;
    ++size;
  }
  return size;
}

// All remainders, `parameter` bits each, then all quotients in unary: zeros ended by a one. Least significant
// bit first; each of the two streams fills whole bytes.
std::vector<std::uint8_t> write_rice(const Gaps& gaps, int parameter) {
  const std::uint64_t remainder_bytes = bytes_for(gaps.size() * static_cast<std::uint64_t>(parameter));
  const std::uint64_t unary_bits = quotient_sum(gaps, parameter) + gaps.size();
  std::vector<std::uint8_t> bytes(remainder_bytes + bytes_for(unary_bits));
  const std::uint64_t mask = (std::uint64_t{1} << parameter) - 1;
  std::uint64_t pending = 0;
  int pending_bits = 0;
  std::uint8_t* out = bytes.data();
  std::uint8_t* unary = bytes.data() + remainder_bytes;
  std::uint64_t one = 0;
  for (const std::uint64_t gap : gaps) {
    pending |= (gap & mask) << pending_bits;
    pending_bits += parameter;  // at most 7 + 40
    for (; pending_bits >= 8; pending_bits -= 8, pending >>= 8) *out++ = static_cast<std::uint8_t>(pending);
    one += gap >> parameter;
    unary[one / 8] = static_cast<std::uint8_t>(unary[one / 8] | 1u << (one % 8));
    ++one;
  }
  if (pending_bits > 0) *out = static_cast<std::uint8_t>(pending);
  return bytes;
}

// Each gap in LEB128: seven bits a byte, least significant first, the high bit set on all but the last.
std::vector<std::uint8_t> write_byte_gaps(const Gaps& gaps, std::uint64_t size) {
  std::vector<std::uint8_t> bytes;
  bytes.reserve(size);
  for (std::uint64_t gap : gaps) {
    for (; gap >= 128; gap >>= 7) bytes.push_back(static_cast<std::uint8_t>(gap | 128u));
    bytes.push_back(static_cast<std::uint8_t>(gap));
  }
  return bytes;
}

std::uint64_t load_word(const std::uint8_t* bytes, std::size_t size, std::size_t at) {
  std::uint64_t word = 0;
  if (at < size) std::memcpy(&word, bytes + at, std::min<std::size_t>(8, size - at));
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

}  // namespace

CodedPositions encode_positions(Indices positions) {
  const Gaps gaps = positions.wide
                        ? gaps_between(static_cast<const std::int64_t*>(positions.data), positions.count)
                        : gaps_between(static_cast<const std::int32_t*>(positions.data), positions.count);
  const int parameter = best_parameter(gaps);
  const std::uint64_t byte_size = byte_gap_size(gaps);
  const std::uint64_t rice_size = bytes_for(gaps.size() * static_cast<std::uint64_t>(parameter)) +
                                  bytes_for(quotient_sum(gaps, parameter) + gaps.size());
  if (byte_size < rice_size) return {PositionCoding::kBytes, 0, write_byte_gaps(gaps, byte_size)};
  return {PositionCoding::kRice, parameter, write_rice(gaps, parameter)};
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
