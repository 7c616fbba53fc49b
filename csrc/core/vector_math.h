// exp, logarithms and a sine in which the compiler finds vectors: no branch, no table, no call.
// Every CPU with fused multiply-add, as all with AVX2 have it, computes the same bits; others
// differ from them in the last places. Within three units in the last place of the true value (exp
// of more than 1: six).
//
// In the namespace of who includes it: a csrc/*/cpu.cpp, once per CPU capability, or a cuda.cu.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/inline.h"

namespace sqloss::core::CPU_CAPABILITY {

template <typename To, typename From>
SQLOSS_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c, rounded once where the CPU does that at no cost.
SQLOSS_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDACC__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
SQLOSS_INLINE double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__CUDACC__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// a / b for b in [1, 4] and |a| <= b, or NaN: on a GPU without the branch that other divisors take.
SQLOSS_INLINE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  const float near = a * reciprocal;
  return multiply_add(multiply_add(-b, near, a), reciprocal, near);
#else
  return a / b;
#endif
}
SQLOSS_INLINE double quotient(double a, double b) { return a / b; }

template <typename T>
struct Float;

template <>
struct Float<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kExponentOfOne = 127;
  // ln 2 in two parts, the first so short that its products with exponents are exact
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Below, exp is taken for 0: nearly all of that has no normal value. Above, it is infinite.
  static constexpr float kExpOfLessIsZero = -87.0f, kExpOfMoreIsInfinite = 89.0f;
  // Terms of the series below whose remainder is under half a unit in the last place
  static constexpr int kExpTerms = 8, kLogTerms = 5, kLog1pTerms = 7, kSineTerms = 7;
};

template <>
struct Float<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kExponentOfOne = 1023;
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpOfLessIsZero = -708.0, kExpOfMoreIsInfinite = 710.0;
  static constexpr int kExpTerms = 14, kLogTerms = 11, kLog1pTerms = 17, kSineTerms = 12;
};

// sum of x^k / k! for k < kTerms, by Horner's rule; factor is 1 / k!
template <int kTerms, int k = 0, typename T>
SQLOSS_INLINE T exp_series(T x, double factor = 1.0) {
  if constexpr (k + 1 == kTerms) {
    return T(factor);
  } else {
    return multiply_add(x, exp_series<kTerms, k + 1>(x, factor / (k + 1)), T(factor));
  }
}

// sum of z^k / (2 k + 1) for k < kTerms
template <int kTerms, int k = 0, typename T>
SQLOSS_INLINE T atanh_series(T z) {
  if constexpr (k + 1 == kTerms) {
    return T(1.0 / (2 * k + 1));
  } else {
    return multiply_add(z, atanh_series<kTerms, k + 1>(z), T(1.0 / (2 * k + 1)));
  }
}

// exp(x), not of numbers near kExpOfMoreIsInfinite, as 2^n * exp(x - n ln 2), |x - n ln 2| <= ln 2
// / 2; below kExpOfLessIsZero 0, or of float on a GPU less than a normal number.
template <typename T>
SQLOSS_INLINE T exp_small(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return expf(x);  // by the hardware's power of 2
#endif
  using Type = Float<T>;
  using Bits = typename Type::Bits;
  // Added to a number, this leaves it rounded to an integer in the lowest bits of the sum.
  constexpr T rounder = T(Bits(3) << (Type::kMantissaBits - 1));
  const T rounded = multiply_add(x, T(1.44269504088896340736), rounder);
  const T n = rounded - rounder;
  const T rest = multiply_add(n, -Type::kLn2Low, multiply_add(n, -Type::kLn2High, x));
  // Multiplied, not added to the exponent of the series: that would make numbers of some NaNs.
  const T two_to_n =
      bits_as<T>(Bits((bits_as<Bits>(rounded) + Type::kExponentOfOne) << Type::kMantissaBits));
  const T result = exp_series<Type::kExpTerms>(rest) * two_to_n;
  return x < Type::kExpOfLessIsZero ? T(0) : result;
}

// exp(x) of any x
template <typename T>
SQLOSS_INLINE T exp(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return expf(x);
#endif
  constexpr T kMost = Float<T>::kExpOfMoreIsInfinite;
  const T half = exp_small(T(0.5) * (x > kMost ? kMost : x));
  return half * half;
}

// sin(pi / 2 * s) / s for s^2 <= 1, given s^2: the series of sine
template <int kTerms, int k = 0, typename T>
SQLOSS_INLINE T sine_series(T s2, double factor = 1.57079632679489661923) {
  if constexpr (k + 1 == kTerms) {
    return T(factor);
  } else {
    constexpr double kQuarterTurnSquared = 2.46740110027233965471;  // (pi / 2)^2
    const double next = -factor * kQuarterTurnSquared / ((2 * k + 2) * (2 * k + 3));
    return multiply_add(s2, sine_series<kTerms, k + 1>(s2, next), T(factor));
  }
}

// log(1 + t) for t in [0, 1], as 2 atanh(t / (2 + t))
template <typename T>
SQLOSS_INLINE T log1p_of_fraction(T t) {
  const T s = quotient(t, T(2) + t);
  return T(2) * s * atanh_series<Float<T>::kLog1pTerms>(s * s);
}

// log(w) = e ln 2 + 2 atanh((m - 1) / (m + 1)) for w = m 2^e, m in [sqrt(1/2), sqrt(2)); w a normal
// positive number. With x, w = 1 + x rounded and this is log(1 + x), with all digits of a small x.
template <typename T>
SQLOSS_INLINE T log1p_of_normal(T x, T w, T shift = T(0)) {
  using Type = Float<T>;
  using Bits = typename Type::Bits;
  constexpr T kTwoToMantissaBits = T(Bits(1) << Type::kMantissaBits);
  const Bits one = Type::kExponentOfOne << Type::kMantissaBits;
  const Bits root = bits_as<Bits>(T(0.70710678118654752440));
  const Bits shifted = bits_as<Bits>(w) + (one - root);
  const T m = bits_as<T>(Bits((shifted & ((Bits(1) << Type::kMantissaBits) - 1)) + root));
  // The biased exponent as the lowest bits of a number 2^kMantissaBits
  const T biased =
      bits_as<T>(Bits((shifted >> Type::kMantissaBits) | bits_as<Bits>(kTwoToMantissaBits)));
  const T e = biased - (kTwoToMantissaBits + T(Type::kExponentOfOne)) + shift;
  const T m_less_1 = m - T(1), numerator = e == T(0) ? x : m_less_1;
  const T s = quotient(numerator, numerator + T(2));
  const T log_m = T(2) * s * atanh_series<Type::kLogTerms>(s * s);
  return multiply_add(e, Type::kLn2High, multiply_add(e, Type::kLn2Low, log_m));
}

// log(w) of a normal positive number, of which w is 2^-shift times too much
template <typename T>
SQLOSS_INLINE T log_of_normal(T w, T shift = T(0)) {
  return log1p_of_normal(w - T(1), w, shift);
}

// log(x) of any x
template <typename T>
SQLOSS_INLINE T log(T x) {
  constexpr int kMantissaBits = Float<T>::kMantissaBits;
  constexpr T kTwoToMantissaBits = T(typename Float<T>::Bits(1) << kMantissaBits);
  const bool subnormal = x < std::numeric_limits<T>::min();
  const T finite =
      log_of_normal(subnormal ? x * kTwoToMantissaBits : x, subnormal ? T(-kMantissaBits) : T(0));

  constexpr T infinity = std::numeric_limits<T>::infinity();
  const T positive = x < infinity ? finite : x;  // also NaN
  const T non_negative = x == T(0) ? -infinity : positive;
  return x < T(0) ? std::numeric_limits<T>::quiet_NaN() : non_negative;
}

}  // namespace sqloss::core::CPU_CAPABILITY
