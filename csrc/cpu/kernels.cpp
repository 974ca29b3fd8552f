#include "cpu/kernels.h"

#include <stdexcept>

namespace freemerge {

// One per instruction set, each compiled from kernels_isa.cpp.
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
  if (isa > detected_isa()) throw std::invalid_argument("this processor has no " + isa_name(isa));
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

const Kernels& active_kernels() {
  static const Kernels& active = kernels(active_isa());
  return active;
}

}  // namespace freemerge
