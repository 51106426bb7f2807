// Built with the flags of this instruction set, see CMakeLists.txt.
#define EMPCAUSE_ISA avx2
#include "kernels.inl"
