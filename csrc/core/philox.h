// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror & Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011): four random words are a function of a key and a counter,
// so any draw can be had alone, by any thread, again.
//
// In the namespace of who includes it: a csrc/*/cpu.cpp, once per CPU capability, or a cuda.cu.
#pragma once

#include <cstdint>

#include "core/inline.h"

#if defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace sqloss::core::CPU_CAPABILITY {

// The words of a counter in the low halves of 64-bit lanes, one counter per lane: the product of
// two words is then one instruction on a vector, and what is left in the high halves is never read.
// A thread of a GPU takes a single lane.
SQLOSS_INLINE uint64_t product(uint64_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // nvcc makes two instructions of the expression below
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(b));
  return product;
#else
  return (a & 0xffffffff) * b;
#endif
}

#ifndef __CUDACC__
#if defined(CPU_CAPABILITY_AVX512)
using Words __attribute__((vector_size(64))) = uint64_t;
inline Words product(Words a, uint32_t b) {
  return reinterpret_cast<Words>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
#elif defined(CPU_CAPABILITY_AVX2)
using Words __attribute__((vector_size(32))) = uint64_t;
inline Words product(Words a, uint32_t b) {
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
#elif defined(__x86_64__)
using Words __attribute__((vector_size(16))) = uint64_t;
inline Words product(Words a, uint32_t b) {
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
}
#else
using Words __attribute__((vector_size(16))) = uint64_t;
inline Words product(Words a, uint32_t b) { return (a & 0xffffffff) * b; }
#endif
#endif

// Counters become random words: kAtOnce vectors of them, which do not wait for one another.
template <int kAtOnce, typename Word>
SQLOSS_INLINE void philox(uint64_t key, Word (&words)[4][kAtOnce]) {
  auto key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kAtOnce; ++i) {
      const Word a = product(words[0][i], 0xD2511F53), b = product(words[2][i], 0xCD9E8D57);
      words[0][i] = (b >> 32) ^ words[1][i] ^ key0;
      words[2][i] = (a >> 32) ^ words[3][i] ^ key1;
      words[1][i] = b;
      words[3][i] = a;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

}  // namespace sqloss::core::CPU_CAPABILITY
