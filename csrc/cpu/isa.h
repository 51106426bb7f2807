// The namespace of the kernels of one instruction set, empcause::cpu::EMPCAUSE_ISA. Every source of kernels is compiled
// once per instruction set, with its flags and -DEMPCAUSE_ISA=its name (CMakeLists.txt). Whoever reads a header alone
// reads it as the baseline's.
//
// The units of two instruction sets must not share a function: of several copies of an inline function the linker keeps
// one, and then an old processor would run instructions that it does not have. So what the kernels call is defined in
// this namespace, or always inlined (EMPCAUSE_EVERYWHERE), or compiled elsewhere. Of the standard library they take
// types and constants, but no function. tests/csrc/test_objects.py reads the objects for it.
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
