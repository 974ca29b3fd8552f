#include "cpu/kernels.h"

#include <cstdlib>
#include <string>

#include "error.h"

namespace freemerge {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

const Kernels& kernels(Isa isa) {
  require(isa <= detected_isa(), "this processor has no " + isa_name(isa));
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

Isa isa_from_name(const std::string& name) {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa_name(isa) == name) return isa;
  }
  throw std::invalid_argument("isa must be avx512, avx2 or baseline, got " + name);
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* const forced = std::getenv("FREEMERGE_ISA");
    if (forced == nullptr || *forced == '\0') return detected_isa();
    try {
      const Isa wanted = isa_from_name(forced);
      kernels(wanted);
      return wanted;
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("FREEMERGE_ISA: ") + error.what());
    }
  }();
  return isa;
}

}  // namespace freemerge
