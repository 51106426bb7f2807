// The kernels of one instruction set.
#include "kernels.h"

#include "backward.h"
#include "forward.h"
#include "isa.h"

namespace empcause::cpu {

const Kernels EMPCAUSE_NAME_OF_ISA(kernels_) = {EMPCAUSE_TEXT_OF_ISA, EMPCAUSE_ISA::kMultipliesBFloat16,
                                                EMPCAUSE_ISA::forward, EMPCAUSE_ISA::backward};

}  // namespace empcause::cpu
