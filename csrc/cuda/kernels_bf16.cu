#define EMPCAUSE_TYPE BFloat16
#define EMPCAUSE_KERNELS kernels_bf16
#include "kernels.inl"
