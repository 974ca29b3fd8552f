// Instruction sets the CPU backend has kernels for, best last.
#pragma once

#include <string>

namespace freemerge {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Best instruction set of this processor.
Isa detected_isa();

// The instruction set that kernels run on: the best one, or the one that the environment variable
// FREEMERGE_ISA names when it is first asked for. Throws if that is unknown or not there.
Isa active_isa();

std::string isa_name(Isa isa);

// The inverse; throws std::invalid_argument for a name that isa_name never gives.
Isa isa_from_name(const std::string& name);

}  // namespace freemerge
