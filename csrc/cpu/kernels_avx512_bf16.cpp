// Built with the flags of this instruction set, see CMakeLists.txt.
#define EMPCAUSE_ISA avx512_bf16
#include "kernels.inl"
