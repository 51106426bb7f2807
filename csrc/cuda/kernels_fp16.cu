#define EMPCAUSE_TYPE Float16
#define EMPCAUSE_KERNELS kernels_fp16
#include "kernels.inl"
