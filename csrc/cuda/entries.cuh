// Eight neighbouring entries of an array in its storage dtype: 16-byte accesses where the address allows
// them, single ones elsewhere. The dtype is looked at once for all eight, and the branch is the same for all
// threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/array.h"
#include "cuda/kernel.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {

constexpr int kEntries = 8;

// As they are stored: two 16-bit entries a word, or one of 32 bits. Nothing waits for them until they are
// widened.
struct StoredEntries {
  std::uint32_t words[kEntries];
};

// Whether all of the eight entries from `first` on exist and lie in as few 16-byte words as possible.
template <typename T>
__device__ bool is_whole(const T* first, std::int64_t left) {
  return left >= kEntries && reinterpret_cast<std::uintptr_t>(first) % sizeof(uint4) == 0;
}

template <typename Bits>
__device__ StoredEntries fetch_bits(const Bits* first, std::int64_t left) {
  constexpr int kPerWord = sizeof(std::uint32_t) / sizeof(Bits);
  StoredEntries entries{};
  if (is_whole(first, left)) {
#pragma unroll
    for (int i = 0; i < kEntries / kPerWord / 4; ++i) {
      const uint4 four = load(reinterpret_cast<const uint4*>(first) + i);
      entries.words[4 * i] = four.x;
      entries.words[4 * i + 1] = four.y;
      entries.words[4 * i + 2] = four.z;
      entries.words[4 * i + 3] = four.w;
    }
    return entries;
  }
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (e >= left) break;
    const auto bits = static_cast<std::uint32_t>(load(first + e));
    entries.words[e / kPerWord] |= bits << (e % kPerWord * 8 * sizeof(Bits));
  }
  return entries;
}

// Entries first .. first + 7 of an array of n; zeros beyond its end.
__device__ inline StoredEntries fetch(const Array& array, std::int64_t first, std::int64_t n) {
  if (array.dtype == DType::kFloat32)
    return fetch_bits(static_cast<const std::uint32_t*>(array.data) + first, n - first);
  return fetch_bits(static_cast<const std::uint16_t*>(array.data) + first, n - first);
}

template <typename T, typename Bits>
__device__ T from_bits(Bits bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
__device__ void widen_pairs(const StoredEntries& stored, float (&values)[kEntries]) {
#pragma unroll
  for (int i = 0; i < kEntries / 2; ++i) {
    values[2 * i] = widen(from_bits<T>(static_cast<std::uint16_t>(stored.words[i])));
    values[2 * i + 1] = widen(from_bits<T>(static_cast<std::uint16_t>(stored.words[i] >> 16)));
  }
}

__device__ inline void widen(const StoredEntries& stored, DType dtype, float (&values)[kEntries]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) values[e] = from_bits<float>(stored.words[e]);
  } else if (dtype == DType::kBFloat16) {
    widen_pairs<__nv_bfloat16>(stored, values);
  } else {
    widen_pairs<__half>(stored, values);
  }
}

template <typename T>
struct alignas(sizeof(uint4)) Chunk {
  T entries[sizeof(uint4) / sizeof(T)];
};

template <typename T>
__device__ void store_rounded(T* first, std::int64_t left, const float (&values)[kEntries]) {
  if (is_whole(first, left)) {
    constexpr int kInChunk = sizeof(uint4) / sizeof(T);
#pragma unroll
    for (int i = 0; i < kEntries / kInChunk; ++i) {
      Chunk<T> chunk;
#pragma unroll
      for (int e = 0; e < kInChunk; ++e) chunk.entries[e] = narrow<T>(values[i * kInChunk + e]);
      store(reinterpret_cast<Chunk<T>*>(first) + i, chunk);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    if (e < left) store(first + e, narrow<T>(values[e]));
  }
}

// Rounds to the dtype of an array of n entries, whose end is respected.
__device__ inline void store_entries(const Array& array, std::int64_t first, std::int64_t n,
                                     const float (&values)[kEntries]) {
  if (array.dtype == DType::kFloat32) {
    store_rounded(static_cast<float*>(array.data) + first, n - first, values);
  } else if (array.dtype == DType::kBFloat16) {
    store_rounded(static_cast<__nv_bfloat16*>(array.data) + first, n - first, values);
  } else {
    store_rounded(static_cast<__half*>(array.data) + first, n - first, values);
  }
}

}  // namespace freemerge::cuda
