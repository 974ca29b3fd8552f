// Runs a CUDA grid on the CPU: blocks one after another, the threads of a block as fibers that switch at
// barriers and warp collectives. Broken synchronisation ends the process with a message.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace freemerge::emulation {

constexpr std::size_t kMaxShared = 227 * 1024;  // of a block, when asked for

enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

// The order in which the threads of a block, and the blocks of a grid, start. Results of correct kernels do
// not depend on it. The environment variable FREEMERGE_EMULATION_ORDER (forward, reverse, random) sets the
// first value.
void set_order(Order order);

struct ThreadIndices {
  uint3 thread{};
  uint3 block{};
  dim3 block_size{1, 1, 1};
  dim3 grid_size{1, 1, 1};
};

// For kernels: the running thread.
extern const ThreadIndices* running_indices;
inline const ThreadIndices& current() { return *running_indices; }
int lane();
void sync_block();
// Every lane in `mask` gives `size` <= 16 bytes; all receive the 32 slots (those of absent lanes are stale).
void warp_exchange(unsigned mask, const void* mine, void* all, std::size_t size);
void* shared_memory();
[[noreturn]] void die(const char* message);

// False if CUDA would refuse the configuration. `body(argument)` is one thread's work. Dynamic shared memory
// is filled with NaN before each block and has exactly `shared` bytes, so AddressSanitizer guards its end.
bool run_grid(dim3 grid, dim3 block, std::size_t shared, void (*body)(void*), void* argument);

// Bytes that kernels and the cuFFT stand-in moved in address ranges of interest.
struct Traffic {
  const char* begin = nullptr;
  const char* end = nullptr;
  std::uint64_t loaded = 0;
  std::uint64_t stored = 0;
  std::uint64_t loads = 0;  // accesses, of whatever size
  std::uint64_t stores = 0;
};

void watch(const void* begin, std::size_t bytes);  // starts counting in one more range
int watched(Traffic* ranges, int capacity);        // the counts so far
void unwatch_all();
extern bool watching;
void count_watched_load(const void* address, std::size_t bytes);
void count_watched_store(const void* address, std::size_t bytes);

inline void count_load(const void* address, std::size_t bytes) {
  if (watching) count_watched_load(address, bytes);
}

inline void count_store(const void* address, std::size_t bytes) {
  if (watching) count_watched_store(address, bytes);
}

}  // namespace freemerge::emulation
