#include "cuda/cufft_api.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>

#include "cuda/error.h"

#if defined(FREEMERGE_HAVE_CUFFT_H)
#include <cufft.h>

#include <type_traits>

namespace {

using namespace freemerge::cuda::cufft;

// C enums and ints pass alike; everything else must be the same type.
template <typename Real, typename Mirror>
constexpr bool same_argument =
    std::is_same_v<Real, Mirror> ||
    (std::is_enum_v<Real> && sizeof(Real) == sizeof(Mirror) && std::is_same_v<Mirror, int>);

template <typename Real, typename Mirror>
struct SameAbi;

template <typename R, typename... A, typename S, typename... B>
struct SameAbi<R (*)(A...), S (*)(B...)> {
  static constexpr bool value =
      sizeof...(A) == sizeof...(B) && same_argument<R, S> && (same_argument<A, B> && ...);
};

#define FM_SAME_ABI(name) \
  static_assert(SameAbi<decltype(&cufft##name), decltype(Api::name)>::value, "cufft" #name " has changed")
FM_SAME_ABI(Create);
FM_SAME_ABI(Destroy);
FM_SAME_ABI(SetAutoAllocation);
FM_SAME_ABI(SetWorkArea);
FM_SAME_ABI(SetStream);
FM_SAME_ABI(MakePlanMany64);
FM_SAME_ABI(ExecR2C);
FM_SAME_ABI(ExecC2R);
FM_SAME_ABI(GetVersion);
static_assert(CUFFT_R2C == kR2C && CUFFT_C2R == kC2R, "cufftType has changed");

}  // namespace
#endif

namespace freemerge::cuda::cufft {
namespace {

std::mutex mutex;
bool is_open = false;
Api table{};
std::string path;

constexpr const char* kSonames[] = {"libcufft.so.12", "libcufft.so.11"};  // CUDA 13, CUDA 12

template <typename Function>
bool bind(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool bind_all(void* library) {
  return bind(library, "cufftCreate", table.Create) && bind(library, "cufftDestroy", table.Destroy) &&
         bind(library, "cufftSetAutoAllocation", table.SetAutoAllocation) &&
         bind(library, "cufftSetWorkArea", table.SetWorkArea) &&
         bind(library, "cufftSetStream", table.SetStream) &&
         bind(library, "cufftMakePlanMany64", table.MakePlanMany64) &&
         bind(library, "cufftExecR2C", table.ExecR2C) && bind(library, "cufftExecC2R", table.ExecC2R) &&
         bind(library, "cufftGetVersion", table.GetVersion);
}

class Search {
 public:
  bool try_library(const std::string& name, int extra_flags = 0) {
    void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL | extra_flags);
    if (!library) {
      const char* reason = dlerror();
      if (!(extra_flags & RTLD_NOLOAD)) note(reason ? reason : name);
      return false;
    }
    if (!bind_all(library)) {
      note(name + " lacks a function this build needs");
      dlclose(library);
      return false;
    }
    Dl_info info;
    path = dladdr(reinterpret_cast<void*>(table.Create), &info) ? info.dli_fname : name;
    is_open = true;
    return true;
  }

  const std::string& failures() const { return failures_; }

 private:
  void note(const std::string& failure) {
    if (!failures_.empty()) failures_ += "; ";
    failures_ += failure;
  }

  std::string failures_;
};

bool search(Search& s, const std::vector<std::string>& paths) {
  const char* const chosen = std::getenv("FREEMERGE_CUFFT");
  if (chosen != nullptr && *chosen != '\0') return s.try_library(chosen);
  for (const char* soname : kSonames) {
    if (s.try_library(soname, RTLD_NOLOAD)) return true;
  }
  for (const std::string& file : paths) {
    if (s.try_library(file)) return true;
  }
  for (const char* soname : kSonames) {
    if (s.try_library(soname)) return true;
  }
  return false;
}

void open_locked(const std::vector<std::string>& paths) {
  if (is_open) return;
  Search s;
  if (!search(s, paths)) throw Error("loading cuFFT", s.failures(), 0, __FILE__, __LINE__);
}

}  // namespace

void open(const std::vector<std::string>& paths) {
  const std::lock_guard<std::mutex> lock(mutex);
  open_locked(paths);
}

const Api& api() {
  const std::lock_guard<std::mutex> lock(mutex);
  open_locked({});
  return table;
}

std::string location() {
  const std::lock_guard<std::mutex> lock(mutex);
  return path;
}

}  // namespace freemerge::cuda::cufft
