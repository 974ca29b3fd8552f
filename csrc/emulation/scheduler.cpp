#include "emulation/scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "emulation/fiber.h"

namespace freemerge::emulation {
namespace {

constexpr int kWarp = 32;
constexpr std::size_t kSlot = 16;              // the largest value a warp collective may carry
constexpr std::size_t kMaxShared = 48 * 1024;  // more must be asked for, which nothing here does

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
  void start_remaining_threads(std::vector<Worker*>& idle);
  void release_complete_warps();
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
  std::vector<Worker*> live_;
  std::vector<std::size_t> sequence_;  // threads in starting order
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
  arrive_at_warp(mask);  // nobody writes its next value before everybody has read this one
}

void Scheduler::resume(Worker* worker) {
  running_ = worker;
  running_indices = &worker->indices;
  worker->fiber.resume();
}

void Scheduler::start_remaining_threads(std::vector<Worker*>& idle) {
  while (next_ < sequence_.size()) {
    if (idle.empty()) {
      pool_.push_back(std::make_unique<Worker>());
      idle.push_back(pool_.back().get());
    }
    Worker* worker = idle.back();
    idle.pop_back();
    worker->wait = Wait::kNothing;
    resume(worker);
    (worker->thread >= 0 ? live_ : idle).push_back(worker);
  }
}

void Scheduler::release_complete_warps() {
  for (Worker* worker : live_) {
    if (worker->wait != Wait::kWarp) continue;
    const int warp = worker->thread / kWarp;
    unsigned& arrived = arrived_[static_cast<std::size_t>(warp)];
    const unsigned mask = worker->mask;
    if ((arrived & mask) != mask) continue;
    arrived &= ~mask;
    for (Worker* other : live_) {
      if (other->wait != Wait::kWarp || other->thread / kWarp != warp) continue;
      if (!(mask >> (other->thread % kWarp) & 1u)) continue;
      if (other->mask != mask) die("warp collective: lanes passed different masks");
      other->wait = Wait::kNothing;
    }
  }
}

void Scheduler::release_complete_block() {
  // A barrier counts the threads that still run: CUDA lets the others have exited.
  const bool all = std::all_of(live_.begin(), live_.end(), [](Worker* w) { return w->wait == Wait::kBlock; });
  if (!all) return;
  for (Worker* worker : live_) worker->wait = Wait::kNothing;
}

void Scheduler::run_block() {
  next_ = 0;
  live_.clear();
  std::fill(finished_.begin(), finished_.end(), char{0});
  std::fill(arrived_.begin(), arrived_.end(), 0u);
  std::memset(shared_.get(), 0xff, shared_size_);  // NaN
  std::vector<Worker*> idle;
  for (const auto& worker : pool_) idle.push_back(worker.get());
  start_remaining_threads(idle);
  while (!live_.empty()) {
    release_complete_warps();
    release_complete_block();
    bool moved = false;
    for (std::size_t i = 0; i < live_.size();) {
      Worker* worker = live_[i];
      if (worker->wait != Wait::kNothing) {
        ++i;
        continue;
      }
      moved = true;
      resume(worker);
      if (worker->thread >= 0) {
        ++i;
      } else {
        live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(i));
        idle.push_back(worker);
      }
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

void count(const void* address, std::size_t bytes, std::uint64_t Traffic::* counter) {
  const char* begin = static_cast<const char*>(address);
  for (Traffic& range : ranges()) {
    if (begin >= range.begin && begin < range.end) range.*counter += bytes;
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

void count_watched_load(const void* address, std::size_t bytes) { count(address, bytes, &Traffic::loaded); }

void count_watched_store(const void* address, std::size_t bytes) { count(address, bytes, &Traffic::stored); }

}  // namespace freemerge::emulation
