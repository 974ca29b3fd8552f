#include "emulation/device/scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "emulation/device/fiber.h"

namespace freemerge::emulation {
namespace {

constexpr int kWarp = 32;
constexpr std::size_t kSlot = 16;  // the largest value a warp collective may carry

enum class Wait { kNothing, kBlock, kWarp };

struct Worker;
void work(void* worker);

// A stack on which threads run one after another, for as long as none of them has to wait.
struct Worker {
  Fiber fiber{&work, this};
  ThreadIndices indices;
  int thread = -1;  // -1: idle
  Wait wait = Wait::kNothing;
  unsigned mask = 0;
};

Order order_from_environment() {
  const char* name = std::getenv("FREEMERGE_EMULATION_ORDER");
  if (name && !std::strcmp(name, "reverse")) return Order::kReverse;
  if (name && !std::strcmp(name, "random")) return Order::kRandom;
  return Order::kForward;
}

class Scheduler {
 public:
  std::mutex mutex;
  Order order = order_from_environment();

  bool run(dim3 grid, dim3 block, std::size_t shared, void (*body)(void*), void* argument);
  void run_threads(Worker& worker);

  Worker& running() { return *running_; }
  uint3 block_index() const { return block_index_; }
  void* shared() { return shared_.get(); }
  void wait_for_block();
  void exchange(unsigned mask, const void* mine, void* all, std::size_t size);

 private:
  void run_block();
  void resume(Worker* worker);
  void start_threads();
  bool run_warp(std::size_t warp);
  void release_complete_collectives(std::size_t warp);
  void release_complete_block();
  void arrive_at_warp(unsigned mask);
  void permute(std::vector<std::size_t>& sequence, std::size_t n);

  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  dim3 grid_;
  dim3 block_;
  uint3 block_index_{};
  std::size_t shared_size_ = 0;
  std::unique_ptr<unsigned char[]> shared_;
  std::vector<std::unique_ptr<Worker>> pool_;
  std::vector<std::vector<Worker*>> warps_;  // threads that have started and not exited
  std::size_t live_ = 0;                     // how many
  std::vector<std::size_t> sequence_;        // threads in starting order
  std::size_t next_ = 0;
  std::vector<char> finished_;
  std::vector<unsigned char> slots_;  // kSlot bytes a thread
  std::vector<unsigned> arrived_;     // lanes, a warp
  Worker* running_ = nullptr;
  std::mt19937 random_{1234};
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

void work(void* worker) { scheduler().run_threads(*static_cast<Worker*>(worker)); }

void Scheduler::run_threads(Worker& worker) {
  for (;;) {
    while (next_ < sequence_.size()) {
      const auto t = static_cast<unsigned>(sequence_[next_++]);
      worker.thread = static_cast<int>(t);
      worker.indices = {
          {t % block_.x, t / block_.x % block_.y, t / (block_.x * block_.y)}, block_index_, block_, grid_};
      body_(argument_);
      finished_[t] = 1;
      worker.thread = -1;
    }
    worker.fiber.suspend();
  }
}

void Scheduler::wait_for_block() {
  Worker& self = running();
  self.wait = Wait::kBlock;
  self.fiber.suspend();
}

void Scheduler::arrive_at_warp(unsigned mask) {
  Worker& self = running();
  self.mask = mask;
  self.wait = Wait::kWarp;
  arrived_[static_cast<std::size_t>(self.thread / kWarp)] |= 1u << (self.thread % kWarp);
  self.fiber.suspend();
}

void Scheduler::exchange(unsigned mask, const void* mine, void* all, std::size_t size) {
  Worker& self = running();
  const int first = self.thread / kWarp * kWarp;
  const int lanes = std::min(kWarp, static_cast<int>(sequence_.size()) - first);
  if (lanes < kWarp) mask &= (1u << lanes) - 1u;
  if (!(mask >> (self.thread - first) & 1u)) die("warp collective: the calling lane is not in its own mask");
  if (size > kSlot) die("warp collective: the value is too large");
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1u) && finished_[static_cast<std::size_t>(first + i)])
      die("warp collective: a lane in the mask has exited");
  }
  std::memcpy(&slots_[static_cast<std::size_t>(self.thread) * kSlot], mine, size);
  arrive_at_warp(mask);
  for (int i = 0; i < lanes; ++i) {
    std::memcpy(static_cast<char*>(all) + static_cast<std::size_t>(i) * size,
                &slots_[static_cast<std::size_t>(first + i) * kSlot], size);
  }
  arrive_at_warp(mask);  // no lane writes its next value before all have read this one
}

void Scheduler::resume(Worker* worker) {
  running_ = worker;
  running_indices = &worker->indices;
  worker->fiber.resume();
}

void Scheduler::start_threads() {
  std::vector<Worker*> idle;
  for (const auto& worker : pool_) idle.push_back(worker.get());
  while (next_ < sequence_.size()) {
    if (idle.empty()) {
      pool_.push_back(std::make_unique<Worker>());
      idle.push_back(pool_.back().get());
    }
    Worker* worker = idle.back();
    worker->wait = Wait::kNothing;
    resume(worker);
    if (worker->thread < 0) continue;  // all the threads it ran have exited
    idle.pop_back();
    warps_[static_cast<std::size_t>(worker->thread / kWarp)].push_back(worker);
    ++live_;
  }
}

void Scheduler::release_complete_collectives(std::size_t warp) {
  for (Worker* worker : warps_[warp]) {
    if (worker->wait != Wait::kWarp) continue;
    unsigned& arrived = arrived_[warp];
    const unsigned mask = worker->mask;
    if ((arrived & mask) != mask) continue;
    arrived &= ~mask;
    for (Worker* other : warps_[warp]) {
      if (other->wait != Wait::kWarp || !(mask >> (other->thread % kWarp) & 1u)) continue;
      if (other->mask != mask) die("warp collective: lanes passed different masks");
      other->wait = Wait::kNothing;
    }
  }
}

// Runs every thread of a warp that can go on; false if none can.
bool Scheduler::run_warp(std::size_t warp) {
  release_complete_collectives(warp);
  std::vector<Worker*>& threads = warps_[warp];
  bool moved = false;
  for (std::size_t i = 0; i < threads.size();) {
    Worker* worker = threads[i];
    if (worker->wait == Wait::kNothing) {
      moved = true;
      resume(worker);
      if (worker->thread < 0) {
        threads.erase(threads.begin() + static_cast<std::ptrdiff_t>(i));
        --live_;
        continue;
      }
    }
    ++i;
  }
  return moved;
}

// A barrier counts the threads that still run: CUDA lets the others have exited.
void Scheduler::release_complete_block() {
  for (const std::vector<Worker*>& warp : warps_) {
    if (std::any_of(warp.begin(), warp.end(), [](Worker* w) { return w->wait != Wait::kBlock; })) return;
  }
  for (const std::vector<Worker*>& warp : warps_) {
    for (Worker* worker : warp) worker->wait = Wait::kNothing;
  }
}

void Scheduler::run_block() {
  next_ = 0;
  live_ = 0;
  for (std::vector<Worker*>& warp : warps_) warp.clear();
  std::fill(finished_.begin(), finished_.end(), char{0});
  std::fill(arrived_.begin(), arrived_.end(), 0u);
  std::memset(shared_.get(), 0xff, shared_size_);  // NaN
  start_threads();
  std::vector<std::size_t> order_of_warps;
  while (live_ > 0) {
    release_complete_block();
    bool moved = false;
    // One warp goes as far as it can before the next: CUDA does not promise that they keep in step.
    permute(order_of_warps, warps_.size());
    for (const std::size_t warp : order_of_warps) {
      while (run_warp(warp)) moved = true;
    }
    if (!moved) die("deadlock: a barrier or warp collective that not every thread reaches");
  }
}

void Scheduler::permute(std::vector<std::size_t>& sequence, std::size_t n) {
  sequence.resize(n);
  std::iota(sequence.begin(), sequence.end(), std::size_t{0});
  if (order == Order::kReverse) std::reverse(sequence.begin(), sequence.end());
  if (order == Order::kRandom) std::shuffle(sequence.begin(), sequence.end(), random_);
}

bool Scheduler::run(dim3 grid, dim3 block, std::size_t shared, void (*body)(void*), void* argument) {
  const std::size_t threads = static_cast<std::size_t>(block.x) * block.y * block.z;
  const bool valid = threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.x <= 0x7fffffffu &&
                     grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 && shared <= kMaxShared;
  if (!valid) return false;
  body_ = body;
  argument_ = argument;
  grid_ = grid;
  block_ = block;
  shared_size_ = shared;
  shared_.reset(new unsigned char[std::max<std::size_t>(shared, 1)]);
  finished_.assign(threads, 0);
  slots_.assign(threads * kSlot, 0);
  arrived_.assign((threads + kWarp - 1) / kWarp, 0);
  warps_.resize(arrived_.size());
  const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
  std::vector<std::size_t> block_sequence;
  permute(block_sequence, blocks);
  permute(sequence_, threads);
  for (const std::size_t b : block_sequence) {
    const std::size_t x = b % grid.x;
    const std::size_t y = b / grid.x % grid.y;
    const std::size_t z = b / grid.x / grid.y;
    block_index_ = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
    if (order == Order::kRandom) permute(sequence_, threads);
    run_block();
  }
  running_ = nullptr;
  return true;
}

std::vector<Traffic>& ranges() {
  static std::vector<Traffic> list;
  return list;
}

void count(const void* address, std::size_t bytes, std::uint64_t Traffic::* counter,
           std::uint64_t Traffic::* accesses) {
  const char* begin = static_cast<const char*>(address);
  for (Traffic& range : ranges()) {
    if (begin < range.begin || begin >= range.end) continue;
    range.*counter += bytes;
    ++(range.*accesses);
  }
}

}  // namespace

void set_order(Order order) { scheduler().order = order; }

const ThreadIndices* running_indices = nullptr;
bool watching = false;

int lane() { return scheduler().running().thread % kWarp; }

void sync_block() { scheduler().wait_for_block(); }

void warp_exchange(unsigned mask, const void* mine, void* all, std::size_t size) {
  scheduler().exchange(mask, mine, all, size);
}

void* shared_memory() { return scheduler().shared(); }

void die(const char* message) {
  const uint3 b = scheduler().block_index();
  std::fprintf(stderr, "emulation: %s (block %u, %u, %u)\n", message, b.x, b.y, b.z);
  std::abort();
}

bool run_grid(dim3 grid, dim3 block, std::size_t shared, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(scheduler().mutex);
  return scheduler().run(grid, block, shared, body, argument);
}

void watch(const void* begin, std::size_t bytes) {
  const char* first = static_cast<const char*>(begin);
  ranges().push_back({first, first + bytes, 0, 0});
  watching = true;
}

int watched(Traffic* out, int capacity) {
  const int n = std::min(capacity, static_cast<int>(ranges().size()));
  std::copy_n(ranges().begin(), n, out);
  return n;
}

void unwatch_all() {
  ranges().clear();
  watching = false;
}

void count_watched_load(const void* address, std::size_t bytes) {
  count(address, bytes, &Traffic::loaded, &Traffic::loads);
}

void count_watched_store(const void* address, std::size_t bytes) {
  count(address, bytes, &Traffic::stored, &Traffic::stores);
}

}  // namespace freemerge::emulation
