// Fibers: functions that run in turns on one thread of the host, each on a stack of its own.
#pragma once

#include <cstddef>

namespace empcause::cuda::emulator {

// The stack pointer of a fiber that is not running; its registers are saved on its stack.
using StackPointer = void*;

// A stack with a guard page at its end. The memory is reused by later stacks.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Prepares a fiber that begins with `run` on this stack. `run` must never return.
  StackPointer prepare(void (*run)());

 private:
  void* memory_;
};

// Saves the running fiber in `from` and continues the fiber `to`.
extern "C" void empcause_switch_fiber(StackPointer* from, StackPointer to);

}  // namespace empcause::cuda::emulator
