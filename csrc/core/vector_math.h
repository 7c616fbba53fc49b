// exp, logarithms and a sine in which the compiler finds vectors: no branch, no table, no call.
// Every CPU with fused multiply-add, as all with AVX2 have it, computes the same bits; others
// differ from them in the last places. Within four units in the last place of the true value (exp
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
  // A number that exp_small takes for 0, and what is below with it: the 2^n of all of them has an
  // exponent of no bits. Above the other, exp is infinite.
  static constexpr float kExpIsZero = -88.0f, kExpOfMoreIsInfinite = 89.0f;
};

template <>
struct Float<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kExponentOfOne = 1023;
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpIsZero = -709.0, kExpOfMoreIsInfinite = 710.0;
};

// Polynomials of float come closest: of all as short they have about the smallest relative error,
// under half a unit in the last place (least squares, weighted ever more where the error is large,
// rounded one coefficient after another). Those of double are series, cut off where it is as small.

// sum of of[k] * x^k by Estrin's scheme: neighbours are joined by x, pairs of them by x^2, and so
// on. A CPU waits for the longest chain of operations, not for their number, and this chain is half
// as long as Horner's.
template <int kCount, typename T>
struct Coefficients {
  T of[kCount];
};

template <int kCount, typename T>
SQLOSS_INLINE T polynomial(const Coefficients<kCount, T>& coefficients, T x) {
  if constexpr (kCount == 1) {
    return coefficients.of[0];
  } else {
    Coefficients<(kCount + 1) / 2, T> joined;
    for (int k = 0; k < kCount / 2; ++k) {
      joined.of[k] = multiply_add(coefficients.of[2 * k + 1], x, coefficients.of[2 * k]);
    }
    if constexpr (kCount % 2 == 1) joined.of[kCount / 2] = coefficients.of[kCount - 1];
    return polynomial(joined, x * x);
  }
}

// sum of x^k / (k + kFrom)! for k < kCount
template <int kCount, int kFrom = 0, typename T>
SQLOSS_INLINE T exp_series(T x) {
  constexpr auto coefficients = [] {
    Coefficients<kCount, T> result{};
    double factor = 1.0;
    for (int k = 1; k < kCount + kFrom; ++k) {
      if (k - 1 >= kFrom) result.of[k - 1 - kFrom] = T(factor);
      factor /= k;
    }
    result.of[kCount - 1] = T(factor);
    return result;
  }();
  return polynomial(coefficients, x);
}

// sum of z^k / (2 (k + kFrom) + 1) for k < kCount
template <int kCount, int kFrom = 0, typename T>
SQLOSS_INLINE T atanh_series(T z) {
  constexpr auto coefficients = [] {
    Coefficients<kCount, T> result{};
    for (int k = 0; k < kCount; ++k) result.of[k] = T(1.0 / (2 * (k + kFrom) + 1));
    return result;
  }();
  return polynomial(coefficients, z);
}

// exp(r) for |r| <= ln 2 / 2
SQLOSS_INLINE float exp_near_0(float r) {
  constexpr Coefficients<7, float> kNearest = {
      {1.0f, 1.0f, 0.49999994f, 0.166665211f, 0.0416682661f, 0.00836867746f, 0.00138207339f}};
  return polynomial(kNearest, r);
}
SQLOSS_INLINE double exp_near_0(double r) { return exp_series<14>(r); }

// (exp(r) - 1) / r for |r| <= ln 2
SQLOSS_INLINE float expm1_ratio_near_0(float r) {
  constexpr Coefficients<7, float> kNearest = {{1.0f, 0.500000238f, 0.166666478f, 0.0416620672f,
                                                0.0083342595f, 0.0014091928f, 0.000198528462f}};
  return polynomial(kNearest, r);
}
SQLOSS_INLINE double expm1_ratio_near_0(double r) { return exp_series<17, 1>(r); }

// (exp(x) - 1 - x) / x^2 for x from -1/2 to 0
SQLOSS_INLINE float exp_remainder_below_0(float x) {
  constexpr Coefficients<5, float> kNearest = {
      {0.5f, 0.166665897f, 0.0416518003f, 0.00824305788f, 0.00116847863f}};
  return polynomial(kNearest, x);
}
SQLOSS_INLINE double exp_remainder_below_0(double x) { return exp_series<14, 2>(x); }

// (atanh(s) / s - 1) / s^2, given s^2 <= 1/81
SQLOSS_INLINE float atanh_remainder_near_0(float s2) {
  constexpr Coefficients<3, float> kNearest = {{0.333333343f, 0.199987426f, 0.145223379f}};
  return polynomial(kNearest, s2);
}
SQLOSS_INLINE double atanh_remainder_near_0(double s2) { return atanh_series<11, 1>(s2); }

// exp(x), not of numbers near kExpOfMoreIsInfinite, as 2^n * exp(x - n ln 2), |x - n ln 2| <= ln 2
// / 2; of what is less than kExpIsZero 0, and about there, or of float on a GPU, less than a normal
// number.
template <typename T>
SQLOSS_INLINE T exp_small(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return expf(x);  // by the hardware's power of 2
#endif
  using Type = Float<T>;
  using Bits = typename Type::Bits;
  // The number is limited, not the result selected: the compiler would select in all that follows.
  x = x < Type::kExpIsZero ? Type::kExpIsZero : x;
  // Added to a number, this leaves it rounded to an integer in the lowest bits of the sum.
  constexpr T rounder = T(Bits(3) << (Type::kMantissaBits - 1));
  const T rounded = multiply_add(x, T(1.44269504088896340736), rounder);
  const T n = rounded - rounder;
  const T rest = multiply_add(n, -Type::kLn2Low, multiply_add(n, -Type::kLn2High, x));
  // Multiplied, not added to the exponent of the series: that would make numbers of some NaNs.
  const T two_to_n =
      bits_as<T>(Bits((bits_as<Bits>(rounded) + Type::kExponentOfOne) << Type::kMantissaBits));
  return exp_near_0(rest) * two_to_n;
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

// sin(pi / 2 * s) / s, given s^2 <= 1
SQLOSS_INLINE float sine_ratio(float s2) {
  constexpr Coefficients<5, float> kNearest = {
      {1.57079637f, -0.64596504f, 0.0796955377f, -0.00468238816f, 0.000155544316f}};
  return polynomial(kNearest, s2);
}
SQLOSS_INLINE double sine_ratio(double s2) {
  constexpr auto coefficients = [] {
    constexpr double kQuarterTurnSquared = 2.46740110027233965471;  // (pi / 2)^2
    Coefficients<12, double> result{};
    double factor = 1.57079632679489661923;
    for (int k = 0; k < 12; ++k) {
      result.of[k] = factor;
      factor *= -kQuarterTurnSquared / ((2 * k + 2) * (2 * k + 3));
    }
    return result;
  }();
  return polynomial(coefficients, s2);
}

// log(1 + t) for t in [0, 1]: of float t + t times the polynomial in t - 1/2 that comes closest, of
// double 2 atanh(t / (2 + t)).
SQLOSS_INLINE float log1p_of_fraction(float t) {
  constexpr Coefficients<9, float> kNearest = {
      {-0.189069780624f, -0.288526665362f, 0.132609084538f, -0.0677114468585f, 0.0366338597588f,
       -0.0202282468878f, 0.0115864779813f, -0.00857445980935f, 0.00523269002747f}};
  return multiply_add(t, polynomial(kNearest, t - 0.5f), t);
}
SQLOSS_INLINE double log1p_of_fraction(double t) {
  const double s = t / (2.0 + t);
  return 2.0 * s * atanh_series<17>(s * s);
}

// log(1 + r) for r from sqrt(1/2) - 1 to sqrt(2) - 1: of float r - r^2 / 2 + r^3 times the
// polynomial that comes closest, of double 2 atanh(r / (2 + r)). The polynomial needs no division,
// but in double so many terms that the division is faster.
SQLOSS_INLINE float log1p_near_0(float r) {
  constexpr Coefficients<8, float> kNearest = {{-0.5f, 0.333339107072f, -0.250013370468f,
                                                0.199630648559f, -0.165775846267f, 0.149147574269f,
                                                -0.142674854578f, 0.0870046356657f}};
  return multiply_add(r * r, polynomial(kNearest, r), r);
}
SQLOSS_INLINE double log1p_near_0(double r) {
  const double s = r / (r + 2.0);
  return 2.0 * s * atanh_series<11>(s * s);
}

// w = (1 + m_less_1) 2^e with 1 + m_less_1 in [sqrt(1/2), sqrt(2)), of a normal positive w.
template <typename T>
struct Scaled {
  T e, m_less_1;
};

template <typename T>
SQLOSS_INLINE Scaled<T> scaled(T w) {
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
  return {biased - (kTwoToMantissaBits + T(Type::kExponentOfOne)), m - T(1)};
}

// log(w), given its e and m_less_1
template <typename T>
SQLOSS_INLINE T log_of_scaled(T e, T m_less_1) {
  using Type = Float<T>;
  const T log_m = log1p_near_0(m_less_1);
  return multiply_add(e, Type::kLn2High, multiply_add(e, Type::kLn2Low, log_m));
}

// log(w) of a normal positive number
template <typename T>
SQLOSS_INLINE T log_of_normal(T w) {
  const Scaled<T> number = scaled(w);
  return log_of_scaled(number.e, number.m_less_1);
}

// log(1 + x), with all digits of a small x, given w = 1 + x rounded, a normal positive number
template <typename T>
SQLOSS_INLINE T log1p_of_normal(T x, T w) {
  const Scaled<T> number = scaled(w);
  return log_of_scaled(number.e, number.e == T(0) ? x : number.m_less_1);
}

// log(x) of any x
template <typename T>
SQLOSS_INLINE T log(T x) {
  constexpr int kMantissaBits = Float<T>::kMantissaBits;
  constexpr T kTwoToMantissaBits = T(typename Float<T>::Bits(1) << kMantissaBits);
  const bool subnormal = x < std::numeric_limits<T>::min();
  const Scaled<T> number = scaled(subnormal ? x * kTwoToMantissaBits : x);
  const T finite =
      log_of_scaled(number.e + (subnormal ? T(-kMantissaBits) : T(0)), number.m_less_1);

  constexpr T infinity = std::numeric_limits<T>::infinity();
  const T positive = x < infinity ? finite : x;  // also NaN
  const T non_negative = x == T(0) ? -infinity : positive;
  return x < T(0) ? std::numeric_limits<T>::quiet_NaN() : non_negative;
}

}  // namespace sqloss::core::CPU_CAPABILITY
