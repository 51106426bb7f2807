// The kernels, compiled once per instruction set: each of the kernels_*.cpp defines EMPCAUSE_ISA and includes this file.
#include <initializer_list>
#include <memory>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "attention.h"

namespace empcause::cpu {

namespace EMPCAUSE_ISA {

// The parts build on each other in this order.
#include "simd.h"
#include "operands.h"
#include "convert.h"
#include "dropout.h"
#include "matmul.h"
#include "tile.h"
#include "decode.h"
#include "forward.h"
#include "backward.h"
#include "limits.h"

}  // namespace EMPCAUSE_ISA

#define EMPCAUSE_TEXT_OF(name) #name
#define EMPCAUSE_TEXT(name) EMPCAUSE_TEXT_OF(name)
#define EMPCAUSE_JOIN_OF(a, b) a##b
#define EMPCAUSE_JOIN(a, b) EMPCAUSE_JOIN_OF(a, b)

extern const Kernels EMPCAUSE_JOIN(kernels_, EMPCAUSE_ISA);
const Kernels EMPCAUSE_JOIN(kernels_, EMPCAUSE_ISA) = {EMPCAUSE_TEXT(EMPCAUSE_ISA), EMPCAUSE_ISA::kHasPairs,
                                                       EMPCAUSE_ISA::forward,       EMPCAUSE_ISA::backward,
                                                       EMPCAUSE_ISA::multiply_adds, EMPCAUSE_ISA::read_all};

}  // namespace empcause::cpu
