#include "cpu/features.h"

#include <cstdlib>

#include "common/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace freemerge {
namespace {

#if defined(__x86_64__)
// Conversions of float16. Not a name that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

}  // namespace

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* const forced = std::getenv("FREEMERGE_ISA");
    if (forced == nullptr || *forced == '\0') return detected_isa();
    try {
      const Isa wanted = isa_from_name(forced);
      require(wanted <= detected_isa(), "this processor has no " + isa_name(wanted));
      return wanted;
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("FREEMERGE_ISA: ") + error.what());
    }
  }();
  return isa;
}

Isa isa_from_name(const std::string& name) {
  for (const IsaName& known : kIsaNames) {
    if (name == known.name) return known.isa;
  }
  throw std::invalid_argument("isa must be avx512, avx2 or baseline, got " + name);
}

std::string isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)].name; }

}  // namespace freemerge
