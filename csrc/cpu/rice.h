// Lossless coding of ascending positions; docs/expert-format.md describes the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/sparse.h"

namespace freemerge {

enum class PositionCoding : int { kBytes = 0, kRice = 1 };

struct CodedPositions {
  PositionCoding coding;
  int parameter;  // kRice: remainder bits
  std::vector<std::uint8_t> bytes;
};

// Codes the gaps between strictly ascending positions in whichever way is shorter.
CodedPositions encode_positions(Indices positions);

// Writes `count` positions below n. Throws std::invalid_argument for bytes other than the only ones that
// stand for these positions in this coding with this parameter, which need not be the shortest choice of
// both.
void decode_positions(PositionCoding coding, int parameter, const std::uint8_t* bytes, std::size_t size,
                      std::int64_t count, std::int64_t n, void* out, bool wide);

}  // namespace freemerge
