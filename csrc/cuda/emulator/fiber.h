// Fibers: functions that take turns on one host thread.
#pragma once

#include <cstddef>

namespace empcause::cuda::emulator {

// A place where execution stopped: its stack pointer.
using Place = void*;

// Memory for stacks with a guard page at the end of each, reused.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Where `run` begins on this stack. It must never return.
  Place prepare(void (*run)());

 private:
  void* memory_;
};

// Stores where execution is in `from` and goes on at `to`.
extern "C" void empcause_switch_fiber(Place* from, Place to);

}  // namespace empcause::cuda::emulator
