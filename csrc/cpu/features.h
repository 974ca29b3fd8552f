// Instruction sets the CPU backend has kernels for, best last.
#pragma once

#include <string>

namespace freemerge {

enum class Isa : int { kBaseline, kAvx2, kAvx512 };

struct IsaName {
  Isa isa;
  const char* name;
};

inline constexpr IsaName kIsaNames[] = {
    {Isa::kBaseline, "baseline"}, {Isa::kAvx2, "avx2"}, {Isa::kAvx512, "avx512"}};

// Floats in the widest vector.
inline constexpr int kMaxLanes = 16;

// Best instruction set of this processor.
Isa detected_isa();

// The instruction set that kernels run on: the best one, or the one that the environment variable
// FREEMERGE_ISA names when it is first asked for. Throws if that is unknown or not there.
Isa active_isa();

std::string isa_name(Isa isa);

// The inverse; throws std::invalid_argument for a name that isa_name never gives.
Isa isa_from_name(const std::string& name);

}  // namespace freemerge
