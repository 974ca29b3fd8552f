// Borrowed work areas: a merge filters thousands of matrices, and fresh pages cost as much as the filter itself.
#pragma once

#include <cstddef>

namespace freemerge {

// `bytes` of memory aligned to 4096 bytes, uninitialised, given back on destruction. Areas that are given back are
// kept for the next borrower, up to a bound; safe to use from several threads.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_;
  std::size_t bytes_;
};

}  // namespace freemerge
