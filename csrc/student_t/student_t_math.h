// The mathematics of Student-t samples and of their KL divergence, on single numbers, for CPU and
// CUDA kernels: plain arithmetic without branches.
//
// Bailey's transform (Mathematics of Computation 62, 1994): with u, v uniform in (0, 1] and
//
//   e = -2 log(u) / df,   t = sqrt(df * expm1(e)) * cos(2 pi v)
//
// t is Student-t with df degrees of freedom, exactly and for every df > 0; of infinite df it is the
// normal sample of Box and Muller.
//
// In the namespace of who includes it: a csrc/*/cpu.cpp, once per CPU capability, or a cuda.cu.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/inline.h"
#include "core/vector_math.h"

namespace sqloss::student_t::CPU_CAPABILITY {

using core::CPU_CAPABILITY::Float;

// --- divisions and roots
// --------------------------------------------------------------------------
//
// Of float on a GPU within two units in the last place, and without the branches that exact ones
// take there; a / b is 0 for b beyond 2^126.

SQLOSS_INLINE float near_quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
SQLOSS_INLINE double near_quotient(double a, double b) { return a / b; }

SQLOSS_INLINE float near_root(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return std::sqrt(x);
#endif
}
SQLOSS_INLINE double near_root(double x) { return std::sqrt(x); }

// --- random numbers ------------------------------------------------------------------------------

// The two that make a sample.
template <typename T>
struct Noise {
  T energy;  // -2 log(u)
  T cosine;  // cos(2 pi v)
};

constexpr double kTwoToMinus21 = 1.0 / (1 << 21), kTwoToMinus30 = 1.0 / (1 << 30),
                 kTwoToMinus32 = kTwoToMinus30 / 4;

// cos(2 pi v) = sin(pi / 2 * (1 - 4 |v|)) for v in [-1/2, 1/2); quarter is 1 - 4 |v|.
template <typename T>
SQLOSS_INLINE T cosine_of_turn(T quarter) {
  return quarter * core::CPU_CAPABILITY::sine_ratio(quarter * quarter);
}

// From a word each: u = (word + 1/2) / 2^32, v = word / 2^32 as a signed number. Both end in
// rounding to float alone, which keeps u's digits where it is small, in the tail.
SQLOSS_INLINE Noise<float> noise(uint32_t u, uint32_t v) {
  constexpr auto step = static_cast<float>(kTwoToMinus32);
  const float uniform = core::CPU_CAPABILITY::multiply_add(static_cast<float>(u), step, step / 2);
  const uint32_t magnitude = v >> 31 ? 0u - v : v;
  const auto quarter = static_cast<float>(static_cast<int32_t>((1u << 30) - magnitude)) *
                       static_cast<float>(kTwoToMinus30);
  return {-2.0f * core::CPU_CAPABILITY::log_of_normal(uniform), cosine_of_turn(quarter)};
}

// From 53 bits each: a word, and the 21 high bits of another.
SQLOSS_INLINE Noise<double> noise(uint32_t u, uint32_t v, uint32_t u_more, uint32_t v_more) {
  const double u_fraction = (static_cast<double>(u_more >> 11) + 0.5) * kTwoToMinus21;
  const double v_fraction = static_cast<double>(v_more >> 11) * kTwoToMinus21;
  const double uniform = (static_cast<double>(u) + u_fraction) * kTwoToMinus32;
  const double turn = static_cast<double>(static_cast<int32_t>(v)) + v_fraction;
  const double quarter = (static_cast<double>(1 << 30) - std::abs(turn)) * kTwoToMinus30;
  return {-2.0 * core::CPU_CAPABILITY::log_of_normal(uniform), cosine_of_turn(quarter)};
}

// --- samples -------------------------------------------------------------------------------------

template <typename T>
SQLOSS_INLINE T normal_sample(const Noise<T>& noise) {
  return near_root(noise.energy) * noise.cosine;
}

// Of e = r + 2 j ln 2 with an integer j and |r| <= ln 2,
//
//   sqrt(expm1(e)) = 2^j sqrt(expm1(r) + (1 - 2^-2j))
//
// in which nothing cancels, also where e is tiny and j is 0, and nothing overflows before t does.
template <typename T>
SQLOSS_INLINE T student_t_sample(const Noise<T>& noise, T df, T inverse_df) {
  using core::CPU_CAPABILITY::bits_as, core::CPU_CAPABILITY::multiply_add;
  using Type = Float<T>;
  using Bits = typename Type::Bits;
  constexpr T rounder = T(Bits(3) << (Type::kMantissaBits - 1));  // as in exp_small

  const T e = noise.energy * inverse_df;
  const T rounded = multiply_add(e, T(0.5 * 1.44269504088896340736), rounder);
  const T j = rounded - rounder;
  const T r = multiply_add(j, T(-2) * Type::kLn2Low, multiply_add(j, T(-2) * Type::kLn2High, e));
  const auto power_of_2 = [](Bits exponent) {
    return bits_as<T>(Bits((Type::kExponentOfOne + exponent) << Type::kMantissaBits));
  };
  const T two_to_j = power_of_2(bits_as<Bits>(rounded));
  const T two_to_minus_j = power_of_2(Bits(0) - bits_as<Bits>(rounded));
  const T rest = multiply_add(-two_to_minus_j, two_to_minus_j, T(1));
  const T series = core::CPU_CAPABILITY::expm1_ratio_near_0(r);
  const T finite = near_root(df * multiply_add(r, series, rest)) * two_to_j;
  const bool is_infinite = e > T(-2) * (Type::kExpIsZero + T(1));
  return (is_infinite ? std::numeric_limits<T>::infinity() : finite) * noise.cosine;
}

// With g = exp(-e) and psi = (1 - g) / e, 1 - 1 / psi, from which
// d t / d df = t * (1 - 1 / psi) / (2 df)
template <typename T>
SQLOSS_INLINE T one_less_inverse_psi(T e) {
  // Below, psi - 1 is summed as its series, sum of (-e)^k / (k + 1)!; elsewhere nothing cancels.
  const bool small = e < T(0.5);
  const T series = -e * core::CPU_CAPABILITY::exp_remainder_below_0(-e);
  const T psi = T(1) + series;
  const T rest = T(1) - core::CPU_CAPABILITY::exp_small(-e), rest_less_e = rest - e;
  return near_quotient(small ? series : rest_less_e, small ? psi : rest);
}

// --- densities -----------------------------------------------------------------------------------
//
// -log of the density of t(0, 1, df) at x is (df + 1) / 2 * log(1 + x^2 / df) and a constant.

// Infinite degrees of freedom are computed as these, so many that log(1 + x^2 / df) is x^2 / df to
// all digits of an |x| up to 1e11, in double 1e112.
template <typename T>
constexpr T kInfiniteDf = static_cast<T>(sizeof(T) == 4 ? 0x1p100 : 0x1p800);

// What depends on the degrees of freedom alone.
template <typename T>
struct Density {
  T df, inverse, root, half_power;  // df, 1 / df, sqrt(1 / df), (df + 1) / 2
};

// NaN where the degrees of freedom are not positive.
template <typename T>
SQLOSS_INLINE Density<T> density(T given) {
  const T most = kInfiniteDf<T>, finite = given > most ? most : given;
  const T df = given > T(0) ? finite : std::numeric_limits<T>::quiet_NaN();
  return {df, T(1) / df, std::sqrt(T(1) / df), T(0.5) * df + T(0.5)};
}

// y = x / sqrt(df) without its sign, and its square, which may overflow.
template <typename T>
struct Square {
  T size, value;
};

template <typename T>
SQLOSS_INLINE Square<T> square_over_df(T x, T inverse_root_of_df) {
  const T size = std::abs(x * inverse_root_of_df);
  return {size, size * size};
}

// 1 makes no difference to the squares of larger ones.
template <typename T>
constexpr T kLarge = static_cast<T>(sizeof(T) == 4 ? 1e8 : 1e16);

// log(1 + y^2)
template <typename T>
SQLOSS_INLINE T log1p_of_square(Square<T> y) {
  const bool large = y.size > kLarge<T>;
  const T plus_1 = T(1) + y.value;
  const T log = core::CPU_CAPABILITY::log1p_of_normal(y.value, large ? y.size : plus_1);
  const T twice = log + log, finite = large ? twice : log;
  return y.size <= std::numeric_limits<T>::max() ? finite : y.size;  // also NaN
}

// -log of the density of t(0, 1, df) at x, without its constant
template <typename T>
SQLOSS_INLINE T minus_log_kernel(const Density<T>& density, T x) {
  return density.half_power * log1p_of_square(square_over_df(x, density.root));
}

// y^2 / (1 + y^2)
template <typename T>
SQLOSS_INLINE T square_over_1_plus_square(Square<T> y) {
  const T ratio = near_quotient(y.value, T(1) + y.value);
  return y.size > kLarge<T> ? T(1) : ratio;
}

// log(1 + y^2) - y^2 / (1 + y^2), which is y^4 / 2 for small y, given the latter: twice
// atanh(s) - s / (1 + s) for s = y^2 / (2 + y^2)
template <typename T>
SQLOSS_INLINE T log1p_less_ratio(Square<T> y, T ratio) {
  constexpr T kSmallSquare = T(0.25);
  const T s = near_quotient(y.value, T(2) + y.value), s2 = s * s;
  const T series = core::CPU_CAPABILITY::atanh_remainder_near_0(s2);
  const T of_small = s * ratio + T(2) * s * s2 * series;
  const T of_large = log1p_of_square(y) - ratio;
  return y.value < kSmallSquare ? of_small : of_large;
}

// y / (1 + y^2)
template <typename T>
SQLOSS_INLINE T over_1_plus_square(T y) {
  const bool large = std::abs(y) > kLarge<T>;
  const T plus_1 = T(1) + y * y;
  return near_quotient(large ? T(1) : y, large ? y : plus_1);
}

// --- normalising constants -----------------------------------------------------------------------

// The density of t(0, 1, df) is (1 + t^2/df)^(-(df+1)/2) / Z with
//
//   log Z = lgamma(df/2) - lgamma((df+1)/2) + log(df * pi) / 2 = log(2 pi) / 2 + rho(df/2)
//
// where rho(x) = log(x)/2 - log(gamma(x + 1/2) / gamma(x)) = 1/(8 x) - 1/(192 x^3) + ...; the
// series follows from the asymptotic one of lgamma (NIST DLMF 5.11.8), with Bernoulli numbers.
// Small x are shifted up by kShift first: gamma(x + 1) = x * gamma(x).
template <typename T>
struct Rho {
  T value, first, second;  // and derivatives in x
};

template <bool kSecond, typename T>
SQLOSS_INLINE Rho<T> rho(T x) {
  constexpr int kShift = 8;
  constexpr T kLargeEnough = T(64);  // and small enough for products of 2 kShift of them
  const bool shifted = x < kLargeEnough;
  const T y = shifted ? x + T(kShift) : x;

  constexpr double kSeries[] = {1.0 / 8,      -1.0 / 192,      1.0 / 640,      -17.0 / 14336,
                                31.0 / 18432, -691.0 / 180224, 5461.0 / 425984};
  constexpr int kTerms = sizeof(T) == 4 ? 3 : 7;
  const T inverse = T(1) / y, inverse2 = inverse * inverse;
  Rho<T> result = {T(0), T(0), T(0)};
  for (int k = kTerms - 1; k >= 0; --k) {
    result.value = result.value * inverse2 + T(kSeries[k]);
    result.first = result.first * inverse2 - T((2 * k + 1) * kSeries[k]);
    result.second = result.second * inverse2 + T((2 * k + 1) * (2 * k + 2) * kSeries[k]);
  }
  result.value *= inverse;
  result.first *= inverse2;
  result.second *= inverse2 * inverse;

  // rho(x) - rho(x + kShift): the logarithm of a product, and its derivatives
  const T from = shifted ? x : T(1);
  T numerator = T(1), denominator = T(1);          // of the product
  T sum_numerator = T(0), sum_denominator = T(1);  // of the sum of 1 / ((x + i) * (x + i + 1/2))
  T second = T(0);
  for (int i = 0; i < kShift; ++i) {
    const T a = from + T(i), b = from + T(i + 0.5), ab = a * b;
    numerator *= b;
    denominator *= a;
    sum_numerator = sum_numerator * ab + sum_denominator;
    sum_denominator *= ab;
    if constexpr (kSecond) second += (a + b) / (ab * ab);
  }
  const T to = from + T(kShift), ratio = numerator / denominator;
  const T value = core::CPU_CAPABILITY::log_of_normal(std::sqrt(from / to) * ratio);
  const T first = T(0.5) * (T(kShift) / (from * to) - sum_numerator / sum_denominator);
  result.value += shifted ? value : T(0);
  result.first += shifted ? first : T(0);
  if constexpr (kSecond) {
    const T squares = T(1) / (to * to) - T(1) / (from * from);
    result.second += shifted ? T(0.5) * (squares + second) : T(0);
  }
  return result;
}

// --- the KL divergence ---------------------------------------------------------------------------

// The part of an element's KL that depends on the degrees of freedom of one density alone, and its
// derivative: log Z, or with kEntropy the entropy.
template <typename T>
struct Constant {
  T value, in_df;
};

template <bool kEntropy, bool kDerivative, typename T>
SQLOSS_INLINE Constant<T> constant_of(const Density<T>& density) {
  const T df = density.df, inverse = density.inverse;
  const auto r = rho < kEntropy && kDerivative > (T(0.5) * df);
  if constexpr (kEntropy) {
    // (df + 1) / 2 * (digamma((df + 1) / 2) - digamma(df / 2)) + log Z
    return {r.value + T(0.5) * (T(1) + inverse) * (T(1) - df * r.first),
            T(-0.5) * inverse * inverse - T(0.25) * (df + T(1)) * r.second};
  } else {
    return {r.value, T(0.5) * r.first};
  }
}

// Of two normal distributions, z and t being a sample and its standard one.
template <typename T>
SQLOSS_INLINE T normal_kl(T z, T t, T log_scale) {
  return T(0.5) * (z * z - t * t) - log_scale;
}

template <typename T>
SQLOSS_INLINE T normal_kl_in_closed_form(T loc, T scale, T log_scale) {
  return T(0.5) * (loc * loc + scale * scale - T(1)) - log_scale;
}

// --- gradients -----------------------------------------------------------------------------------
//
// Of a sample's z and of its KL: in_z and in_kl.

// The derivative of the KL's cross term, -log p(z), in z.
template <typename T>
SQLOSS_INLINE T cross_term_in_z(const Density<T>& prior, T z) {
  const T power = T(2) * prior.half_power * prior.root;
  return power * over_1_plus_square(z * prior.root);
}

// What a sample gives to the gradient of df, but for the constants of the KL; with in_z the whole
// gradient of z. At large df, terms of the order 1 / df cancel to one of the order 1 / df^2; so
// that its digits stay, log1p_less_ratio takes their difference as a series.
template <bool kOwnTerm, typename T>
SQLOSS_INLINE T gradient_of_df(const Density<T>& posterior, T t, T energy, T scale, T in_z,
                               T in_kl) {
  const T inverse = posterior.inverse;
  const T psi_term = one_less_inverse_psi(energy * inverse);
  T in_df = in_z * scale * t * inverse * psi_term;
  if constexpr (kOwnTerm) {
    const auto square = square_over_df(t, posterior.root);
    const T ratio = square_over_1_plus_square(square);
    in_df -=
        in_kl * (log1p_less_ratio(square, ratio) + ratio * ((T(1) + inverse) * psi_term - inverse));
  }
  return T(0.5) * in_df;
}

template <typename T>
SQLOSS_INLINE T gradient_of_prior_df(const Density<T>& prior, T z, T in_kl) {
  const auto square = square_over_df(z, prior.root);
  const T ratio = square_over_1_plus_square(square);
  return T(0.5) * in_kl * (log1p_less_ratio(square, ratio) - ratio * prior.inverse);
}

// The gradient in what `scale` holds, given that in the scale through z; of a KL its -log(scale)
// too, with in_kl the gradient of all samples.
template <typename T>
SQLOSS_INLINE T gradient_of_scale(bool as_logarithm, T factor, bool has_kl, T scale, T through_z,
                                  T in_kl) {
  const T in_log = factor * (scale * through_z - in_kl);
  const T in_scale = has_kl ? through_z - near_quotient(in_kl, scale) : through_z;
  return as_logarithm ? in_log : in_scale;
}

}  // namespace sqloss::student_t::CPU_CAPABILITY
