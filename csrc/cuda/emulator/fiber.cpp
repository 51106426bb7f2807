// Stacks and the switch between fibers, in assembly for x86-64 and aarch64.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace empcause::cuda::emulator {

namespace {

constexpr size_t kGuardBytes = 16384, kStackBytes = 256 * 1024;

std::mutex mutex;           // guards `unused`
std::vector<void*> unused;  // memory of stacks that were destroyed

}  // namespace

Stack::Stack() {
  {
    const std::lock_guard lock(mutex);
    if (!unused.empty()) {
      memory_ = unused.back();
      unused.pop_back();
      return;
    }
  }
  memory_ = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory_, kGuardBytes, PROT_NONE);
}

Stack::~Stack() {
  const std::lock_guard lock(mutex);
  unused.push_back(memory_);
}

// The switch pushes the callee-saved registers on the stack of the running fiber, above the return
// address, and pops those of the other one. A new stack is prepared as if it had been switched away
// from: with registers 0 and the return address `run`.
#if defined(__x86_64__)

asm(R"(
.text
.globl empcause_switch_fiber
.type empcause_switch_fiber, @function
empcause_switch_fiber:
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
.size empcause_switch_fiber, .-empcause_switch_fiber
)");

StackPointer Stack::prepare(void (*run)()) {
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(memory_) + kGuardBytes + kStackBytes);
  *--top = 0;  // the return address of `run`, which never returns; it also aligns the stack as after a call
  *--top = reinterpret_cast<uint64_t>(run);
  for (int i = 0; i < 6; ++i) *--top = 0;
  return top;
}

#elif defined(__aarch64__)

asm(R"(
.text
.globl empcause_switch_fiber
.type empcause_switch_fiber, %function
empcause_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size empcause_switch_fiber, .-empcause_switch_fiber
)");

StackPointer Stack::prepare(void (*run)()) {
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(memory_) + kGuardBytes + kStackBytes) - 20;
  for (int i = 0; i < 20; ++i) top[i] = 0;
  top[11] = reinterpret_cast<uint64_t>(run);  // x30
  return top;
}

#else
#error "The emulator switches fibers on x86-64 and aarch64"
#endif

}  // namespace empcause::cuda::emulator
