// Built with the flags of this instruction set, see CMakeLists.txt.
#define EMPCAUSE_ISA avx512
#include "kernels.inl"
