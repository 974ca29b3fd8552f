// Mistakes that CUDA code makes, one by one: `seeded_bugs NAME` must fail under the emulation, and say why.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cuda/kernel.cuh"

extern "C" {
int cufftCreate(int*);
int cufftSetAutoAllocation(int, int);
int cufftSetWorkArea(int, void*);
int cufftMakePlanMany64(int, int, long long*, long long*, long long, long long, long long*, long long,
                        long long, int, long long, std::size_t*);
int cufftExecR2C(int, float*, void*);
int cufftExecC2R(int, void*, float*);
}

namespace {

using freemerge::cuda::Launch;
using freemerge::cuda::shared_memory;

struct Job {
  float* data;
  int n;
};

__global__ void sum(Job job) {  // correct
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = job.data[threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x; ++i) total += shared[i];
  job.data[0] = total;
}

__global__ void missing_barrier(Job job) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = job.data[threadIdx.x];
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x; ++i) total += shared[i];
  job.data[0] = total;
}

__global__ void divergent_barrier(Job job) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    job.data[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  }
}

__global__ void global_overflow(Job job) { job.data[threadIdx.x + 1] = 1.0f; }

__global__ void shared_overflow(Job job) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  job.data[threadIdx.x] = shared[threadIdx.x];
}

__global__ void uninitialised_shared(Job job) {
  float* shared = shared_memory<float>();
  if (threadIdx.x > 0) shared[threadIdx.x] = job.data[threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x; ++i) total += shared[i];
  job.data[0] = total;
}

__global__ void exited_lane(Job job) {
  if (threadIdx.x >= 20) return;
  job.data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, job.data[threadIdx.x], 16);
}

__global__ void absent_lane(Job job) {
  if (threadIdx.x < 16) job.data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void lane_outside_mask(Job job) {
  if (threadIdx.x < 16) job.data[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

__global__ void different_masks(Job job) {
  job.data[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1.0f, 1);
}

__global__ void misaligned_vector(Job job) { job.data[0] = reinterpret_cast<const float4*>(job.data + 1)->x; }

__global__ void index_overflow(Job job) {
  const int rows = 65536 + job.n;
  job.data[0] = static_cast<float>(rows * 40000);
}

// Each block needs what the block before it wrote: the kernel works in one order of blocks only.
__global__ void race_between_blocks(Job job) {
  const unsigned b = blockIdx.x;
  job.data[b + 1] = job.data[b] + 1.0f;
}

int wrong(const char* what) {
  std::printf("wrong result: %s\n", what);
  return 1;
}

int run_sum(void (*kernel)(Job)) {
  const std::unique_ptr<float[]> data(new float[32]);
  for (int i = 0; i < 32; ++i) data[std::size_t(i)] = static_cast<float>(i);
  freemerge::cuda::launch(kernel, Launch("sum", dim3(1), dim3(32), 32 * sizeof(float), nullptr),
                          Job{data.get(), 32});
  return data[0] == 496.0f ? 0 : wrong("not 496");
}

int run_plain(void (*kernel)(Job), std::size_t shared = 0, unsigned threads = 32) {
  const std::unique_ptr<float[]> data(new float[32]());
  freemerge::cuda::launch(kernel, Launch("bug", dim3(1), dim3(threads), shared, nullptr),
                          Job{data.get(), 32});
  return 0;
}

int run_blocks() {
  float data[9] = {};
  freemerge::cuda::launch(race_between_blocks, Launch("race", dim3(8), dim3(1), 0, nullptr), Job{data, 8});
  return data[8] == 8.0f ? 0 : wrong("a block ran before the one it needs");
}

// cuFFT, misused. A padded in-place real transform of two lines of 6.
struct Fft {
  int handle = 0;
  std::size_t work_bytes = 0;
  alignas(8) float data[20] = {};
  std::unique_ptr<char[]> work;

  int make(int type, bool embeds = true, long long distance = 0) {
    long long n = 6;
    long long real = 8;
    long long complex = 4;
    const bool forward = type == 0x2a;
    cufftCreate(&handle);
    cufftSetAutoAllocation(handle, 0);
    const long long in = distance > 0 ? distance : (forward ? real : complex);
    const int result = cufftMakePlanMany64(handle, 1, &n, embeds ? (forward ? &real : &complex) : nullptr, 1,
                                           in, embeds ? (forward ? &complex : &real) : nullptr, 1,
                                           forward ? complex : real, type, 2, &work_bytes);
    if (result == 0) {
      work.reset(new char[work_bytes]);
      cufftSetWorkArea(handle, work.get());
    }
    return result;
  }
};

int refused(int result) {
  if (result != 0) std::printf("cuFFT refused: %d\n", result);
  return result;
}

int run_fft(const char* name) {
  Fft fft;
  if (!std::strcmp(name, "fft_without_embeds")) return refused(fft.make(0x2a, false));
  if (!std::strcmp(name, "fft_overlapping_lines")) return refused(fft.make(0x2a, true, 5));
  if (!std::strcmp(name, "fft_reuses_input")) {
    fft.make(0x2c);
    float out[16];
    cufftExecC2R(fft.handle, fft.data, out);
    return std::isnan(fft.data[0]) ? wrong("the spectrum is gone after the inverse transform") : 0;
  }
  if (fft.make(0x2a) != 0) return 2;
  if (!std::strcmp(name, "fft_without_work_area")) {
    cufftSetWorkArea(fft.handle, nullptr);
    return refused(cufftExecR2C(fft.handle, fft.data, fft.data));
  }
  if (!std::strcmp(name, "fft_unaligned"))
    return refused(cufftExecR2C(fft.handle, fft.data + 1, fft.data + 1));
  if (!std::strcmp(name, "fft_work_area_too_small")) {
    fft.work.reset(new char[fft.work_bytes - 1]);
    cufftSetWorkArea(fft.handle, fft.work.get());
    return cufftExecR2C(fft.handle, fft.data, fft.data);
  }
  if (!std::strcmp(name, "fft_keeps_data_in_work_area")) {
    float* kept = reinterpret_cast<float*>(fft.work.get());
    kept[0] = 1.0f;
    cufftExecR2C(fft.handle, fft.data, fft.data);
    return kept[0] == 1.0f ? 0 : wrong("the work area was overwritten");
  }
  if (!std::strcmp(name, "fft_correct")) return cufftExecR2C(fft.handle, fft.data, fft.data);
  return 2;
}

struct Named {
  const char* name;
  void (*kernel)(Job);
  std::size_t shared;
};

constexpr Named kPlain[] = {{"divergent_barrier", divergent_barrier, 0},
                            {"global_overflow", global_overflow, 0},
                            {"shared_overflow", shared_overflow, 32 * sizeof(float)},
                            {"exited_lane", exited_lane, 0},
                            {"absent_lane", absent_lane, 0},
                            {"lane_outside_mask", lane_outside_mask, 0},
                            {"different_masks", different_masks, 0},
                            {"misaligned_vector", misaligned_vector, 0},
                            {"index_overflow", index_overflow, 0}};

int run(const char* name) {
  if (!std::strcmp(name, "correct")) return run_sum(sum);
  if (!std::strcmp(name, "missing_barrier")) return run_sum(missing_barrier);
  if (!std::strcmp(name, "uninitialised_shared")) return run_sum(uninitialised_shared);
  if (!std::strcmp(name, "race_between_blocks")) return run_blocks();
  if (!std::strcmp(name, "too_many_threads")) return run_plain(sum, 0, 2048);
  if (!std::strcmp(name, "too_much_shared_memory"))
    return run_plain(sum, freemerge::emulation::kMaxShared + 4);
  for (const Named& plain : kPlain) {
    if (!std::strcmp(name, plain.name)) return run_plain(plain.kernel, plain.shared);
  }
  return run_fft(name);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    return run(argv[1]);
  } catch (const freemerge::cuda::Error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
