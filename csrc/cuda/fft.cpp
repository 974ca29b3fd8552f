#include "cuda/fft.h"

#include <iterator>
#include <list>
#include <memory>

#include "cuda/error.h"
#include "cuda/heuristics.h"

namespace freemerge::cuda {
namespace {

struct Entry {
  FftKey key;
  std::unique_ptr<Fft> plan;
  bool pinned;
};

// Most recently used first.
thread_local std::list<Entry> cache;

void evict_oldest() {
  for (auto entry = std::prev(cache.end()); entry != cache.begin(); --entry) {
    if (entry->pinned) continue;
    cache.erase(entry);
    return;
  }
}

}  // namespace

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

Fft::Fft(const FftKey& key) : type_(key.type) {
  const cufft::Api& api = cufft::api();
  check_cufft(api.Create(&handle_), "cufftCreate");
  try {
    check_cufft(api.SetAutoAllocation(handle_, 0), "cufftSetAutoAllocation");
    const int rank = key.rows == 0 ? 1 : 2;
    const cufft::Size rows = key.rows == 0 ? 1 : key.rows;
    // Explicit embeds: with a null one cuFFT would ignore all strides.
    cufft::Size n[2] = {rows, key.length};
    cufft::Size real[2] = {rows, key.real_pitch};
    cufft::Size complex[2] = {rows, key.complex_pitch};
    const int first = 2 - rank;  // a single axis is the last entry of each
    cufft::Size* in = key.type == cufft::kR2C ? real : complex;
    cufft::Size* out = key.type == cufft::kC2R ? real : complex;
    check_cufft(api.MakePlanMany64(handle_, rank, n + first, in + first, 1, rows * in[1], out + first, 1,
                                   rows * out[1], key.type, key.batch, &work_bytes_),
                "cufftMakePlanMany64");
  } catch (...) {
    api.Destroy(handle_);
    throw;
  }
}

Fft::~Fft() { cufft::api().Destroy(handle_); }

void Fft::execute(void* in, void* out, void* work, cudaStream_t stream) const {
  const cufft::Api& api = cufft::api();
  check_cufft(api.SetStream(handle_, stream), "cufftSetStream");
  check_cufft(api.SetWorkArea(handle_, work), "cufftSetWorkArea");
  if (type_ == cufft::kR2C) {
    check_cufft(api.ExecR2C(handle_, static_cast<float*>(in), static_cast<float2*>(out)), "cufftExecR2C");
  } else {
    check_cufft(api.ExecC2R(handle_, static_cast<float2*>(in), static_cast<float*>(out)), "cufftExecC2R");
  }
}

const Fft& cached_fft(const FftKey& key, bool capturing) {
  for (auto entry = cache.begin(); entry != cache.end(); ++entry) {
    if (!(entry->key == key)) continue;
    entry->pinned = entry->pinned || capturing;
    cache.splice(cache.begin(), cache, entry);
    return *cache.front().plan;
  }
  if (capturing) {
    throw Error("capturing a graph", "a cuFFT plan is missing; run the same call once before the capture", 0,
                __FILE__, __LINE__);
  }
  cache.push_front({key, std::make_unique<Fft>(key), false});
  if (cache.size() > heuristics::kPlansCached) evict_oldest();
  return *cache.front().plan;
}

void clear_fft_cache() { cache.clear(); }

std::size_t fft_cache_size() { return cache.size(); }

}  // namespace freemerge::cuda
