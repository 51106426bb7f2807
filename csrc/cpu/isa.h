// The namespace of the kernels of one instruction set, empcause::cpu::EMPCAUSE_ISA. CMakeLists.txt
// compiles every source of kernels once per instruction set, with the flags of that set and
// -DEMPCAUSE_ISA=<its name>. A header that is parsed alone, as an editor does, belongs to the baseline.
//
// The units of two instruction sets must not share a function: of several copies of an inline function
// the linker keeps one, and then an old processor would run instructions that it does not have. So
// every function that the kernels call is defined in this namespace, or always inlined
// (EMPCAUSE_EVERYWHERE), or compiled in another unit. The kernels use types and constants of the
// standard library, but none of its functions. tests/csrc/test_objects.py checks the objects.
#pragma once

#if !defined(EMPCAUSE_ISA)
#define EMPCAUSE_ISA baseline
#endif

// In the unit of avx2, EMPCAUSE_NAME_OF_ISA(kernels_) is kernels_avx2 and EMPCAUSE_TEXT_OF_ISA is "avx2".
#define EMPCAUSE_JOIN_EXPANDED(a, b) a##b
#define EMPCAUSE_JOIN(a, b) EMPCAUSE_JOIN_EXPANDED(a, b)
#define EMPCAUSE_TEXT_EXPANDED(name) #name
#define EMPCAUSE_TEXT(name) EMPCAUSE_TEXT_EXPANDED(name)
#define EMPCAUSE_NAME_OF_ISA(prefix) EMPCAUSE_JOIN(prefix, EMPCAUSE_ISA)
#define EMPCAUSE_TEXT_OF_ISA EMPCAUSE_TEXT(EMPCAUSE_ISA)
