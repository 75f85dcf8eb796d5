// What the lanes of a warp compute together, with the fragments of the PTX ISA, section "Warp-level
// matrix instructions". Compiled with the scheduler.
#ifndef WARP_H
#define WARP_H

#include "emulator.h"

namespace emulator {

static const unsigned LANES = 32;

// All lanes have given their operands.
void compute(Operation operation, const Operands (&operands)[LANES]);

} // namespace emulator

#endif
