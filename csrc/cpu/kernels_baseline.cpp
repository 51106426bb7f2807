// Built with the flags of this instruction set, see CMakeLists.txt.
#define EMPCAUSE_ISA baseline
#include "kernels.inl"
