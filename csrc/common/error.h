// Argument checks. std::invalid_argument becomes ValueError in Python.
#pragma once

#include <stdexcept>
#include <string>

namespace freemerge {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace freemerge
