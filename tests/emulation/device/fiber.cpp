#include "emulation/device/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define FM_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FM_EMULATION_ASAN 1
#endif
#endif

#if defined(FM_EMULATION_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, its pointer in *from, and continues on stack `to`.
// swapcontext() would make a system call each time, hundreds of times slower.
extern "C" void freemerge_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl freemerge_emulation_switch
.hidden freemerge_emulation_switch
.type freemerge_emulation_switch,@function
freemerge_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size freemerge_emulation_switch,.-freemerge_emulation_switch
)");
#endif

namespace freemerge::emulation {
namespace {

constexpr std::size_t kGuard = 4096;
constexpr std::size_t kStack = 256 * 1024;

#if defined(__x86_64__)
thread_local Fiber* starting = nullptr;  // a fresh stack has no registers to pass an argument in
#endif

}  // namespace

Fiber::Fiber(Entry entry, void* argument) : entry_(entry), argument_(argument) {
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  mprotect(stack_, kGuard, PROT_NONE);
#if defined(__x86_64__)
  // Six zero registers below the return address; the ABI wants rsp % 16 == 8 at function entry.
  void** top = reinterpret_cast<void**>(stack_ + kStack) - 3;
  *--top = reinterpret_cast<void*>(+[] { start(starting); });
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  inside_ = top;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = kStack;
  inside_.uc_link = nullptr;
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&inside_, reinterpret_cast<void (*)()>(&Fiber::start_ucontext), 2,
              static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
#endif
}

Fiber::~Fiber() { munmap(stack_, kStack); }

#if !defined(__x86_64__)
void Fiber::start_ucontext(unsigned high, unsigned low) {
  start(reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(high) << 32 | low));
}
#endif

void Fiber::start(Fiber* self) {
#if defined(FM_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_bottom_, &self->outside_size_);
#endif
  self->entry_(self->argument_);
}

void Fiber::resume() {
#if defined(FM_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&fake_outside_, stack_, kStack);
#endif
#if defined(__x86_64__)
  if (!started_) starting = this;
  started_ = true;
  freemerge_emulation_switch(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
#if defined(FM_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(FM_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&fake_inside_, outside_bottom_, outside_size_);
#endif
#if defined(__x86_64__)
  freemerge_emulation_switch(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
#if defined(FM_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fake_inside_, &outside_bottom_, &outside_size_);
#endif
}

}  // namespace freemerge::emulation
