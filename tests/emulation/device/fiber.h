// A stackful coroutine: the stack of one emulated CUDA thread.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace freemerge::emulation {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  // `entry` must never return: it ends by suspending for good.
  Fiber(Entry entry, void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();   // called from outside: runs the fiber until it suspends
  void suspend();  // called from inside: returns to whoever resumed it

 private:
  static void start(Fiber* self);
#if !defined(__x86_64__)
  static void start_ucontext(unsigned high, unsigned low);
#endif

  Entry entry_;
  void* argument_;
  char* stack_;
  bool started_ = false;
#if defined(__x86_64__)
  void* inside_ = nullptr;  // saved stack pointers
  void* outside_ = nullptr;
#else
  ucontext_t inside_;
  ucontext_t outside_;
#endif
  // AddressSanitizer keeps a shadow of each stack and must be told of every switch.
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outside_bottom_ = nullptr;
  std::size_t outside_size_ = 0;
};

}  // namespace freemerge::emulation
