// SHA-256 of two streams at once: the instructions of one wait for each other, so two take hardly longer.
#pragma once

#include <cstdint>

namespace freemerge {

// Whether this processor has the instructions; without them a library's SHA-256 is as good.
bool has_sha256();

// The eight words of the state of one stream, and where the whole blocks of 64 bytes lie that it takes next.
struct Sha256Stream {
  std::uint32_t* state;
  const std::uint8_t* data;
};

// Takes `blocks` blocks of each of `count` streams, two at most. Throws where has_sha256() is false.
void sha256(const Sha256Stream* streams, int count, std::int64_t blocks);

}  // namespace freemerge
