#define EMPCAUSE_TYPE float
#define EMPCAUSE_KERNELS kernels_fp32
#include "kernels.inl"
