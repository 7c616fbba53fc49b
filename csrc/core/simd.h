// Sixteen numbers at a time, for selection: comparison in the total order, compression, and sums in
// sixteen double lanes. Every capability adds the same numbers in the same lanes in the same order,
// so that all give the same bits.
//
//              AVX-512            AVX2                          NEON (arm64)
//   mask       a bit per lane     a vector of all or no bits    the same
//   compress   one instruction    permutation by a table of     byte permutation by a table of
//                                 256, eight lanes at a time    16, four lanes at a time
//   counts     popcount           masks subtracted in lanes     the same
//
// NEON takes the place of the portable vectors where the compiler makes code for arm64.
//
// Included by csrc/*/cpu.cpp alone; compiled once per CPU capability, in its namespace.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <numeric>
#include <type_traits>

#include "core/total_order.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sqloss::core::CPU_CAPABILITY {

constexpr int64_t kLanes = 16;

// The sum of the first `count` lanes, halves added to halves. Each step is a loop of a fixed
// length: vectors of any other are stored and loaded again in parts, for which a CPU waits.
template <int64_t count = kLanes>
double fold(double (&lanes)[kLanes]) {
  if constexpr (count == 1) {
    return lanes[0];
  } else {
    for (int64_t i = 0; i < count / 2; ++i) lanes[i] += lanes[i + count / 2];
    return fold<count / 2>(lanes);
  }
}

// Numbers are compared with bounds that are never NaN: a NaN lies above all of them.
//
//   Block<T>::load(p)          kLanes numbers
//   block.above(bound)         Mask of those > bound or NaN
//   block.reaches(bound)       Mask of those >= bound or NaN
//   block.compress(mask, out)  stores the chosen ones in order, and garbage up to kLanes numbers
//   lanes.add(block)           adds the numbers, each in its lane
//   lanes.add(block, mask)     adds the chosen ones
//   lanes.add_products(of_b, a, b, mask)
//                              adds the products a * b of the chosen ones, as doubles, and these b
//                              to the lanes of_b; b is finite
//   lanes.total()              of the lanes, in one order
//   without(a, b), any(mask), count(mask), of_doubles(mask): the mask for a Block<double>
//   Counts<T>: add(mask of a Block<T>), total(); up to kLanes * 2^32 numbers
#if defined(CPU_CAPABILITY_AVX512)

using Mask = __mmask16;  // a bit per lane
inline Mask without(Mask a, Mask b) { return _kandn_mask16(b, a); }
inline Mask of_doubles(Mask mask) { return mask; }
inline __mmask8 low(Mask mask) { return static_cast<__mmask8>(mask); }
inline __mmask8 high(Mask mask) { return static_cast<__mmask8>(_kshiftri_mask16(mask, 8)); }
inline bool any(Mask mask) { return mask != 0; }
inline int64_t count(Mask mask) { return _mm_popcnt_u32(_cvtmask16_u32(mask)); }

template <typename T>
struct Counts {
  int64_t items = 0;

  void add(Mask mask) { items += count(mask); }
  int64_t total() const { return items; }
};

struct Doubles {
  __m512d v[2];
};

template <typename T>
struct Block;

template <>
struct Block<float> {
  __m512 v;

  static Block load(const float* p) { return {_mm512_loadu_ps(p)}; }
  Mask above(float bound) const {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_NLE_UQ);
  }
  Mask reaches(float bound) const {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
  }
  // Compressed in a register: the instruction that stores as it compresses is slow on some CPUs.
  void compress(Mask mask, float* out) const {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, v));
  }
  Doubles doubles() const {
    return {{_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
             _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))}};
  }
};

template <>
struct Block<double> {
  __m512d v[2];

  static Block load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
  Mask above(double bound) const { return compare<_CMP_NLE_UQ>(bound); }
  Mask reaches(double bound) const { return compare<_CMP_NLT_UQ>(bound); }
  void compress(Mask mask, double* out) const {
    _mm512_storeu_pd(out, _mm512_maskz_compress_pd(low(mask), v[0]));
    _mm512_storeu_pd(out + count(low(mask)), _mm512_maskz_compress_pd(high(mask), v[1]));
  }
  Doubles doubles() const { return {{v[0], v[1]}}; }

 private:
  template <int kPredicate>
  Mask compare(double bound) const {
    const __m512d b = _mm512_set1_pd(bound);
    return _mm512_kunpackb(_mm512_cmp_pd_mask(v[1], b, kPredicate),
                           _mm512_cmp_pd_mask(v[0], b, kPredicate));
  }
};

struct Lanes {
  __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};

  template <typename T>
  void add(const Block<T>& block) {
    add(block.doubles(), 0xffff);
  }
  template <typename T>
  void add(const Block<T>& block, Mask mask) {
    add(block.doubles(), mask);
  }
  template <typename T, typename U>
  void add_products(Lanes& of_b, const Block<T>& a, const Block<U>& b, Mask mask) {
    const Doubles x = a.doubles(), y = b.doubles();
    add(Doubles{{_mm512_mul_pd(x.v[0], y.v[0]), _mm512_mul_pd(x.v[1], y.v[1])}}, mask);
    of_b.add(y, mask);
  }
  double total() const {
    double lanes[kLanes];
    _mm512_storeu_pd(lanes, sum[0]);
    _mm512_storeu_pd(lanes + 8, sum[1]);
    return fold(lanes);
  }

 private:
  void add(const Doubles& x, Mask mask) {
    sum[0] = _mm512_mask_add_pd(sum[0], low(mask), sum[0], x.v[0]);
    sum[1] = _mm512_mask_add_pd(sum[1], high(mask), sum[1], x.v[1]);
  }
};

#elif defined(CPU_CAPABILITY_AVX2)

// All bits of a lane, or none: floats in two vectors, doubles in four.
struct MaskFloat {
  __m256 v[2];
};
struct MaskDouble {
  __m256d v[4];
};

inline MaskFloat without(const MaskFloat& a, const MaskFloat& b) {
  return {_mm256_andnot_ps(b.v[0], a.v[0]), _mm256_andnot_ps(b.v[1], a.v[1])};
}
inline uint32_t bits(const MaskFloat& m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.v[0])) |
         static_cast<uint32_t>(_mm256_movemask_ps(m.v[1])) << 8;
}
inline MaskDouble without(const MaskDouble& a, const MaskDouble& b) {
  return {_mm256_andnot_pd(b.v[0], a.v[0]), _mm256_andnot_pd(b.v[1], a.v[1]),
          _mm256_andnot_pd(b.v[2], a.v[2]), _mm256_andnot_pd(b.v[3], a.v[3])};
}
inline uint32_t bits(const MaskDouble& m) {
  uint32_t all = 0;
  for (int i = 0; i < 4; ++i) {
    all |= static_cast<uint32_t>(_mm256_movemask_pd(m.v[i])) << (4 * i);
  }
  return all;
}
inline const MaskDouble& of_doubles(const MaskDouble& mask) { return mask; }
inline MaskDouble of_doubles(const MaskFloat& mask) {
  const auto widened = [](__m128i quarter) {
    return _mm256_castsi256_pd(_mm256_cvtepi32_epi64(quarter));
  };
  const __m256i low = _mm256_castps_si256(mask.v[0]), high = _mm256_castps_si256(mask.v[1]);
  return {widened(_mm256_castsi256_si128(low)), widened(_mm256_extracti128_si256(low, 1)),
          widened(_mm256_castsi256_si128(high)), widened(_mm256_extracti128_si256(high, 1))};
}
inline bool any(const MaskFloat& mask) {
  return _mm256_movemask_ps(_mm256_or_ps(mask.v[0], mask.v[1])) != 0;
}
inline bool any(const MaskDouble& mask) {
  const __m256d low = _mm256_or_pd(mask.v[0], mask.v[1]);
  return _mm256_movemask_pd(_mm256_or_pd(low, _mm256_or_pd(mask.v[2], mask.v[3]))) != 0;
}
inline int64_t count(const MaskFloat& mask) { return _mm_popcnt_u32(bits(mask)); }
inline int64_t count(const MaskDouble& mask) { return _mm_popcnt_u32(bits(mask)); }

// In the lanes of the masks, as 32 or 64 bits: chosen ones are -1 there.
template <typename T>
struct Counts;

template <>
struct Counts<float> {
  __m256i items[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};

  void add(const MaskFloat& mask) {
    for (int i = 0; i < 2; ++i) {
      items[i] = _mm256_sub_epi32(items[i], _mm256_castps_si256(mask.v[i]));
    }
  }
  int64_t total() const {
    uint32_t lanes[kLanes];
    std::memcpy(lanes, items, sizeof(lanes));
    return std::accumulate(lanes, lanes + kLanes, int64_t(0));
  }
};

template <>
struct Counts<double> {
  __m256i items = _mm256_setzero_si256();

  void add(const MaskDouble& mask) {
    for (const __m256d v : mask.v) items = _mm256_sub_epi64(items, _mm256_castpd_si256(v));
  }
  int64_t total() const {
    int64_t lanes[4];
    std::memcpy(lanes, &items, sizeof(lanes));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
};

// Of a mask of eight 32-bit lanes: which lanes are chosen, in order.
constexpr std::array<std::array<uint8_t, 8>, 256> chosen_lanes() {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    int chosen = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) table[mask][chosen++] = static_cast<uint8_t>(lane);
    }
  }
  return table;
}
alignas(64) inline constexpr auto kChosenLanes = chosen_lanes();

inline __m256i permutation(uint32_t mask) {
  return _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kChosenLanes[mask].data())));
}

template <typename T>
struct Block;

template <>
struct Block<float> {
  __m256 v[2];

  static Block load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  MaskFloat above(float bound) const { return compare<_CMP_NLE_UQ>(bound); }
  MaskFloat reaches(float bound) const { return compare<_CMP_NLT_UQ>(bound); }
  void compress(const MaskFloat& mask, float* out) const {
    for (int half = 0; half < 2; ++half) {
      const auto chosen = static_cast<uint32_t>(_mm256_movemask_ps(mask.v[half]));
      _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(v[half], permutation(chosen)));
      out += _mm_popcnt_u32(chosen);
    }
  }
  Block chosen(const MaskFloat& mask) const {  // 0 elsewhere
    return {_mm256_and_ps(v[0], mask.v[0]), _mm256_and_ps(v[1], mask.v[1])};
  }
  __m256d doubles(int quarter) const {
    const __m256 half = v[quarter / 2];
    return _mm256_cvtps_pd(quarter % 2 == 0 ? _mm256_castps256_ps128(half)
                                            : _mm256_extractf128_ps(half, 1));
  }

 private:
  template <int kPredicate>
  MaskFloat compare(float bound) const {
    const __m256 b = _mm256_set1_ps(bound);
    return {_mm256_cmp_ps(v[0], b, kPredicate), _mm256_cmp_ps(v[1], b, kPredicate)};
  }
};

template <>
struct Block<double> {
  __m256d v[4];

  static Block load(const double* p) {
    return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8),
            _mm256_loadu_pd(p + 12)};
  }
  MaskDouble above(double bound) const { return compare<_CMP_NLE_UQ>(bound); }
  MaskDouble reaches(double bound) const { return compare<_CMP_NLT_UQ>(bound); }
  void compress(const MaskDouble& mask, double* out) const {
    for (int i = 0; i < 4; ++i) {
      // A double is two 32-bit lanes
      const auto halves = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castpd_ps(mask.v[i])));
      _mm256_storeu_pd(out, _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(v[i]),
                                                                      permutation(halves))));
      out += _mm_popcnt_u32(halves) / 2;
    }
  }
  Block chosen(const MaskDouble& mask) const {  // 0 elsewhere
    return {_mm256_and_pd(v[0], mask.v[0]), _mm256_and_pd(v[1], mask.v[1]),
            _mm256_and_pd(v[2], mask.v[2]), _mm256_and_pd(v[3], mask.v[3])};
  }
  Block chosen(const MaskFloat& mask) const { return chosen(of_doubles(mask)); }
  __m256d doubles(int quarter) const { return v[quarter]; }

 private:
  template <int kPredicate>
  MaskDouble compare(double bound) const {
    const __m256d b = _mm256_set1_pd(bound);
    return {_mm256_cmp_pd(v[0], b, kPredicate), _mm256_cmp_pd(v[1], b, kPredicate),
            _mm256_cmp_pd(v[2], b, kPredicate), _mm256_cmp_pd(v[3], b, kPredicate)};
  }
};

struct Lanes {
  __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                    _mm256_setzero_pd()};

  template <typename T>
  void add(const Block<T>& block) {
    for (int i = 0; i < 4; ++i) sum[i] = _mm256_add_pd(sum[i], block.doubles(i));
  }
  template <typename T, typename Mask>
  void add(const Block<T>& block, const Mask& mask) {
    add(block.chosen(mask));
  }
  // Each b is converted once, and its register is soon free.
  template <typename T, typename U, typename Mask>
  void add_products(Lanes& of_b, const Block<T>& a, const Block<U>& b, const Mask& mask) {
    const Block<T> x = a.chosen(mask);  // 0 * 0 elsewhere
    const Block<U> y = b.chosen(mask);
    for (int i = 0; i < 4; ++i) {
      const __m256d number = y.doubles(i);
      of_b.sum[i] = _mm256_add_pd(of_b.sum[i], number);
      if constexpr (sizeof(T) == 4 && sizeof(U) == 4) {
        // The product of two floats is exact in double: fused or not, the sum is the same
        sum[i] = _mm256_fmadd_pd(x.doubles(i), number, sum[i]);
      } else {
        sum[i] = _mm256_add_pd(sum[i], _mm256_mul_pd(x.doubles(i), number));
      }
    }
  }
  double total() const {
    double lanes[kLanes];
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(lanes + 4 * i, sum[i]);
    return fold(lanes);
  }
};

#elif defined(__aarch64__)

// All bits of a lane, or none: floats in four vectors, doubles in eight.
struct MaskFloat {
  uint32x4_t v[4];
};
struct MaskDouble {
  uint64x2_t v[8];
};

inline MaskFloat without(const MaskFloat& a, const MaskFloat& b) {
  MaskFloat left;
  for (int i = 0; i < 4; ++i) left.v[i] = vbicq_u32(a.v[i], b.v[i]);
  return left;
}
inline MaskDouble without(const MaskDouble& a, const MaskDouble& b) {
  MaskDouble left;
  for (int i = 0; i < 8; ++i) left.v[i] = vbicq_u64(a.v[i], b.v[i]);
  return left;
}
inline const MaskDouble& of_doubles(const MaskDouble& mask) { return mask; }
inline MaskDouble of_doubles(const MaskFloat& mask) {
  MaskDouble wide;
  for (int i = 0; i < 4; ++i) {
    const int32x4_t narrow = vreinterpretq_s32_u32(mask.v[i]);
    wide.v[2 * i] = vreinterpretq_u64_s64(vmovl_s32(vget_low_s32(narrow)));
    wide.v[2 * i + 1] = vreinterpretq_u64_s64(vmovl_high_s32(narrow));
  }
  return wide;
}
inline bool any(const MaskFloat& mask) {
  const uint32x4_t low = vorrq_u32(mask.v[0], mask.v[1]);
  return vmaxvq_u32(vorrq_u32(low, vorrq_u32(mask.v[2], mask.v[3]))) != 0;
}
inline bool any(const MaskDouble& mask) {
  uint64x2_t all = mask.v[0];
  for (int i = 1; i < 8; ++i) all = vorrq_u64(all, mask.v[i]);
  return vmaxvq_u32(vreinterpretq_u32_u64(all)) != 0;
}

// In the lanes of the masks: chosen ones are -1 there.
template <typename T>
struct Counts;

template <>
struct Counts<float> {
  uint32x4_t items[4] = {};

  void add(const MaskFloat& mask) {
    for (int i = 0; i < 4; ++i) items[i] = vsubq_u32(items[i], mask.v[i]);
  }
  int64_t total() const {
    int64_t sum = 0;
    for (const uint32x4_t lanes : items) sum += static_cast<int64_t>(vaddlvq_u32(lanes));
    return sum;
  }
};

template <>
struct Counts<double> {
  uint64x2_t items[2] = {};

  void add(const MaskDouble& mask) {
    for (int i = 0; i < 8; ++i) items[i % 2] = vsubq_u64(items[i % 2], mask.v[i]);
  }
  int64_t total() const { return static_cast<int64_t>(vaddvq_u64(vaddq_u64(items[0], items[1]))); }
};

inline int64_t count(const MaskFloat& mask) {
  const uint32x4_t low = vaddq_u32(mask.v[0], mask.v[1]);
  const uint32x4_t all = vaddq_u32(low, vaddq_u32(mask.v[2], mask.v[3]));
  return -static_cast<int32_t>(vaddvq_u32(all));
}
inline int64_t count(const MaskDouble& mask) {
  Counts<double> counts;
  counts.add(mask);
  return counts.total();
}

// Of a mask of four 32-bit lanes: the bytes of those that are chosen, in order, and how many.
struct ChosenBytes {
  uint8_t bytes[16];
  int64_t lanes;
};
constexpr std::array<ChosenBytes, 16> chosen_bytes() {
  std::array<ChosenBytes, 16> table{};
  for (int mask = 0; mask < 16; ++mask) {
    for (int lane = 0; lane < 4; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int i = 0; i < 4; ++i) {
        table[mask].bytes[4 * table[mask].lanes + i] = static_cast<uint8_t>(4 * lane + i);
      }
      ++table[mask].lanes;
    }
  }
  return table;
}
inline constexpr auto kChosenBytes = chosen_bytes();

template <typename T>
struct Block;

template <>
struct Block<float> {
  float32x4_t v[4];

  static Block load(const float* p) {
    return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
  }
  // Comparisons whose converse is false of a NaN
  MaskFloat above(float bound) const {
    MaskFloat mask;
    for (int i = 0; i < 4; ++i) mask.v[i] = vmvnq_u32(vcleq_f32(v[i], vdupq_n_f32(bound)));
    return mask;
  }
  MaskFloat reaches(float bound) const {
    MaskFloat mask;
    for (int i = 0; i < 4; ++i) mask.v[i] = vmvnq_u32(vcltq_f32(v[i], vdupq_n_f32(bound)));
    return mask;
  }
  void compress(const MaskFloat& mask, float* out) const {
    const uint32x4_t weights = {1, 2, 4, 8};
    for (int i = 0; i < 4; ++i) {
      const ChosenBytes& chosen = kChosenBytes[vaddvq_u32(vandq_u32(mask.v[i], weights))];
      const uint8x16_t bytes = vreinterpretq_u8_f32(v[i]);
      vst1q_f32(out, vreinterpretq_f32_u8(vqtbl1q_u8(bytes, vld1q_u8(chosen.bytes))));
      out += chosen.lanes;
    }
  }
  Block chosen(const MaskFloat& mask) const {  // 0 elsewhere
    Block block;
    for (int i = 0; i < 4; ++i) {
      block.v[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v[i]), mask.v[i]));
    }
    return block;
  }
  float64x2_t doubles(int eighth) const {
    const float32x4_t quarter = v[eighth / 2];
    return eighth % 2 == 0 ? vcvt_f64_f32(vget_low_f32(quarter)) : vcvt_high_f64_f32(quarter);
  }
};

template <>
struct Block<double> {
  float64x2_t v[8];

  static Block load(const double* p) {
    Block block;
    for (int i = 0; i < 8; ++i) block.v[i] = vld1q_f64(p + 2 * i);
    return block;
  }
  MaskDouble above(double bound) const {
    MaskDouble mask;
    for (int i = 0; i < 8; ++i) mask.v[i] = inverted(vcleq_f64(v[i], vdupq_n_f64(bound)));
    return mask;
  }
  MaskDouble reaches(double bound) const {
    MaskDouble mask;
    for (int i = 0; i < 8; ++i) mask.v[i] = inverted(vcltq_f64(v[i], vdupq_n_f64(bound)));
    return mask;
  }
  void compress(const MaskDouble& mask, double* out) const {
    for (int i = 0; i < 8; ++i) {
      // The upper number stands in both places where the lower one is not chosen
      vst1q_f64(out, vbslq_f64(mask.v[i], v[i], vdupq_laneq_f64(v[i], 1)));
      out -= static_cast<int64_t>(vaddvq_u64(mask.v[i]));
    }
  }
  Block chosen(const MaskDouble& mask) const {  // 0 elsewhere
    Block block;
    for (int i = 0; i < 8; ++i) {
      block.v[i] = vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(v[i]), mask.v[i]));
    }
    return block;
  }
  Block chosen(const MaskFloat& mask) const { return chosen(of_doubles(mask)); }
  float64x2_t doubles(int eighth) const { return v[eighth]; }

 private:
  static uint64x2_t inverted(uint64x2_t mask) {
    return vreinterpretq_u64_u32(vmvnq_u32(vreinterpretq_u32_u64(mask)));
  }
};

struct Lanes {
  float64x2_t sum[8] = {};

  template <typename T>
  void add(const Block<T>& block) {
    for (int i = 0; i < 8; ++i) sum[i] = vaddq_f64(sum[i], block.doubles(i));
  }
  template <typename T, typename Mask>
  void add(const Block<T>& block, const Mask& mask) {
    add(block.chosen(mask));
  }
  template <typename T, typename U, typename Mask>
  void add_products(Lanes& of_b, const Block<T>& a, const Block<U>& b, const Mask& mask) {
    const Block<T> x = a.chosen(mask);  // 0 * b elsewhere: b is finite
    for (int i = 0; i < 8; ++i) {
      sum[i] = vaddq_f64(sum[i], vmulq_f64(x.doubles(i), b.doubles(i)));
    }
    of_b.add(b, mask);
  }
  double total() const {
    double lanes[kLanes];
    for (int i = 0; i < 8; ++i) vst1q_f64(lanes + 2 * i, sum[i]);
    return fold(lanes);
  }
};

#else

// The compilers' own vectors, which they cut into what the machine has. A mask holds all bits of a
// lane, or none.
template <typename T>
using Vector __attribute__((vector_size(4 * sizeof(T)))) = T;

template <typename Int>
struct MaskOf {
  Vector<Int> v[4];
};

template <typename Int>
MaskOf<Int> without(const MaskOf<Int>& a, const MaskOf<Int>& b) {
  return {{a.v[0] & ~b.v[0], a.v[1] & ~b.v[1], a.v[2] & ~b.v[2], a.v[3] & ~b.v[3]}};
}
inline const MaskOf<int64_t>& of_doubles(const MaskOf<int64_t>& mask) { return mask; }
inline MaskOf<int64_t> of_doubles(const MaskOf<int32_t>& mask) {
  MaskOf<int64_t> wide;
  for (int i = 0; i < 4; ++i) wide.v[i] = __builtin_convertvector(mask.v[i], Vector<int64_t>);
  return wide;
}
template <typename Int>
bool any(const MaskOf<Int>& mask) {
  const Vector<Int> all = mask.v[0] | mask.v[1] | mask.v[2] | mask.v[3];
  uint64_t words[sizeof(all) / 8];
  std::memcpy(words, &all, sizeof(all));
  return std::accumulate(std::begin(words), std::end(words), uint64_t(0), std::bit_or<>()) != 0;
}
template <typename Int>
int64_t count(const MaskOf<Int>& mask) {
  const Vector<Int> sums = mask.v[0] + mask.v[1] + mask.v[2] + mask.v[3];
  return -static_cast<int64_t>(sums[0] + sums[1] + sums[2] + sums[3]);
}

// In the lanes of the masks: chosen ones are -1 there.
template <typename T>
struct Counts {
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Unsigned = std::make_unsigned_t<Int>;
  Vector<Unsigned> items[4] = {};

  void add(const MaskOf<Int>& mask) {
    for (int i = 0; i < 4; ++i) items[i] -= reinterpret_cast<Vector<Unsigned> >(mask.v[i]);
  }
  int64_t total() const {
    Unsigned lanes[kLanes];
    std::memcpy(lanes, items, sizeof(lanes));
    return std::accumulate(lanes, lanes + kLanes, int64_t(0));
  }
};

template <typename T>
struct Block {
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vector<T> v[4];

  static Block load(const T* p) {
    Block block;
    std::memcpy(block.v, p, sizeof(block.v));
    return block;
  }
  MaskOf<Int> above(T bound) const {
    return {{~(v[0] <= bound), ~(v[1] <= bound), ~(v[2] <= bound), ~(v[3] <= bound)}};
  }
  MaskOf<Int> reaches(T bound) const {
    return {{~(v[0] < bound), ~(v[1] < bound), ~(v[2] < bound), ~(v[3] < bound)}};
  }
  template <typename MaskInt>
  void compress(const MaskOf<MaskInt>& mask, T* out) const {
    if (count(mask) == 0) return;  // the usual case of a long row
    for (int64_t i = 0; i < kLanes; ++i) {
      *out = v[i / 4][i % 4];
      out -= mask.v[i / 4][i % 4];
    }
  }
  template <typename MaskInt>
  Block chosen(const MaskOf<MaskInt>& mask) const {  // 0 elsewhere
    Block block;
    for (int i = 0; i < 4; ++i) {
      const auto wide = __builtin_convertvector(mask.v[i], Vector<Int>);
      block.v[i] = reinterpret_cast<Vector<T> >(reinterpret_cast<Vector<Int> >(v[i]) & wide);
    }
    return block;
  }
  Vector<double> doubles(int quarter) const {
    return __builtin_convertvector(v[quarter], Vector<double>);
  }
};

struct Lanes {
  Vector<double> sum[4] = {};

  template <typename T>
  void add(const Block<T>& block) {
    for (int i = 0; i < 4; ++i) sum[i] += block.doubles(i);
  }
  template <typename T, typename Int>
  void add(const Block<T>& block, const MaskOf<Int>& mask) {
    add(block.chosen(mask));
  }
  template <typename T, typename U, typename Int>
  void add_products(Lanes& of_b, const Block<T>& a, const Block<U>& b, const MaskOf<Int>& mask) {
    const Block<T> x = a.chosen(mask);  // 0 * b elsewhere: b is finite
    for (int i = 0; i < 4; ++i) sum[i] += x.doubles(i) * b.doubles(i);
    of_b.add(b, mask);
  }
  double total() const {
    double lanes[kLanes];
    std::memcpy(lanes, sum, sizeof(lanes));
    return fold(lanes);
  }
};

#endif

}  // namespace sqloss::core::CPU_CAPABILITY
