#include "cpu/sha256.h"

#include "common/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace freemerge {

#if defined(__x86_64__)
namespace {

// FIPS 180-4, section 4.2.2.
alignas(16) constexpr std::uint32_t kConstants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

template <int kStreams>
__attribute__((target("sha,sse4.1"))) void take_blocks(const Sha256Stream* streams, std::int64_t blocks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i abef[kStreams], cdgh[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    const auto* const words = reinterpret_cast<const __m128i*>(streams[s].state);
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1b);
    abef[s] = _mm_alignr_epi8(cdab, efgh, 8);
    cdgh[s] = _mm_blend_epi16(efgh, cdab, 0xf0);
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
    __m128i first[kStreams], second[kStreams], message[kStreams][4];
    for (int s = 0; s < kStreams; ++s) {
      first[s] = abef[s];
      second[s] = cdgh[s];
    }
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {  // four rounds each
      const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(kConstants) + g);
#pragma GCC unroll 2
      for (int s = 0; s < kStreams; ++s) {
        __m128i* const w = message[s];  // words of the last four groups
        if (g < 4) {
          const auto* const data = reinterpret_cast<const __m128i*>(streams[s].data + 64 * block) + g;
          w[g] = _mm_shuffle_epi8(_mm_loadu_si128(data), swap);
        } else {
          const __m128i last = w[(g + 3) % 4];
          const __m128i seventh = _mm_alignr_epi8(last, w[(g + 2) % 4], 4);
          const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[g % 4], w[(g + 1) % 4]), seventh);
          w[g % 4] = _mm_sha256msg2_epu32(sum, last);
        }
        const __m128i terms = _mm_add_epi32(w[g % 4], constants);
        cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], terms);
        abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], _mm_shuffle_epi32(terms, 0x0e));
      }
    }
    for (int s = 0; s < kStreams; ++s) {
      abef[s] = _mm_add_epi32(abef[s], first[s]);
      cdgh[s] = _mm_add_epi32(cdgh[s], second[s]);
    }
  }
  for (int s = 0; s < kStreams; ++s) {
    auto* const words = reinterpret_cast<__m128i*>(streams[s].state);
    const __m128i feba = _mm_shuffle_epi32(abef[s], 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(cdgh[s], 0xb1);
    _mm_storeu_si128(words, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(words + 1, _mm_alignr_epi8(dchg, feba, 8));
  }
}

}  // namespace

bool has_sha256() {
  // SHA is no name that every compiler's __builtin_cpu_supports knows.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & (1u << 29)) != 0 &&
         __builtin_cpu_supports("sse4.1");
}

void sha256(const Sha256Stream* streams, int count, std::int64_t blocks) {
  require(has_sha256(), "this processor has no instructions for SHA-256");
  require(count >= 0 && count <= 2, "sha256 takes two streams at most");
  if (count == 1) take_blocks<1>(streams, blocks);
  if (count == 2) take_blocks<2>(streams, blocks);
}

#else

bool has_sha256() { return false; }

void sha256(const Sha256Stream*, int, std::int64_t) {
  throw std::invalid_argument("this build has no SHA-256");
}

#endif

}  // namespace freemerge
