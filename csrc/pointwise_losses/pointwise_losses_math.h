// The pointwise losses and their derivatives, on single numbers, for CPU and CUDA kernels: plain
// arithmetic without branches, from which compilers make that on vectors. The formulas are in
// pointwise_losses.h.
//
// In the namespace of who includes it: a csrc/*/cpu.cpp, once per CPU capability, or a cuda.cu.
#pragma once

#include <cmath>

#include "core/inline.h"
#include "core/vector_math.h"
#include "pointwise_losses/pointwise_losses.h"

namespace sqloss::pointwise_losses::CPU_CAPABILITY {

using core::CPU_CAPABILITY::exp_small;
using core::CPU_CAPABILITY::log1p_of_fraction;
using core::CPU_CAPABILITY::quotient;

template <typename T>
struct Derivatives {
  T input, target, other;
};

template <typename T>
SQLOSS_INLINE T positive_part(T x) {
  return x > T(0) ? x : T(0);
}

template <typename T>
struct BinaryCrossEntropyWithLogits {
  explicit BinaryCrossEntropyWithLogits(const Inputs&) {}

  // What the loss and its derivatives begin with; it may be given to them.
  SQLOSS_INLINE static T first(T x) { return exp_small(-std::abs(x)); }

  // softplus(x) = max(x, 0) + log(1 + exp(-|x|)): nothing cancels where y is 0 or 1
  SQLOSS_INLINE static T loss(T x, T y, T pos_weight) { return loss(x, y, pos_weight, first(x)); }
  SQLOSS_INLINE static T loss(T x, T y, T pos_weight, T e) {
    const T size = std::abs(x), log_term = log1p_of_fraction(e);
    const T negative = T(1) - y, positive = pos_weight * y;
    const T linear = (x > T(0) ? negative : positive) * size;  // of one softplus: the other's is 0
    return core::CPU_CAPABILITY::multiply_add(negative + positive, log_term, linear);
  }
  SQLOSS_INLINE static Derivatives<T> derivatives(T x, T y, T pos_weight) {
    return derivatives(x, y, pos_weight, first(x));
  }
  SQLOSS_INLINE static Derivatives<T> derivatives(T x, T y, T pos_weight, T e) {
    const T large = quotient(T(1), T(1) + e), small = e * large;  // sigmoid(|x|), sigmoid(-|x|)
    const T sigmoid = x > T(0) ? large : small, rest = x > T(0) ? small : large;
    const T log_term = log1p_of_fraction(e);
    return {(T(1) - y) * sigmoid - pos_weight * y * rest,
            pos_weight * (positive_part(-x) + log_term) - (positive_part(x) + log_term), T(0)};
  }
};

template <typename T>
struct Mse {
  explicit Mse(const Inputs&) {}

  SQLOSS_INLINE static T loss(T x, T y, T) { return (x - y) * (x - y); }
  SQLOSS_INLINE static Derivatives<T> derivatives(T x, T y, T) {
    return {T(2) * (x - y), T(2) * (y - x), T(0)};
  }
};

template <typename T>
struct SmoothL1 {
  T beta;
  explicit SmoothL1(const Inputs& in) : beta(static_cast<T>(in.parameter)) {}

  SQLOSS_INLINE T loss(T x, T y, T) const {
    const T distance = std::abs(x - y);
    const T near = T(0.5) * distance * (distance / beta);  // the square may be infinite
    const T far = distance - T(0.5) * beta;
    return distance < beta ? near : far;
  }
  SQLOSS_INLINE Derivatives<T> derivatives(T x, T y, T) const {
    const T difference = x - y;
    const T near = difference / beta;
    const T below = difference < T(0) ? T(-1) : difference;  // 0 and NaN stay
    const T far = difference > T(0) ? T(1) : below;
    const T in_x = std::abs(difference) < beta ? near : far;
    return {in_x, -in_x, T(0)};
  }
};

template <typename T>
struct Huber {
  T delta;
  explicit Huber(const Inputs& in) : delta(static_cast<T>(in.parameter)) {}

  SQLOSS_INLINE T loss(T x, T y, T) const {
    const T distance = std::abs(x - y);
    const T near = T(0.5) * distance * distance;
    const T far = delta * (distance - T(0.5) * delta);
    return distance < delta ? near : far;
  }
  SQLOSS_INLINE Derivatives<T> derivatives(T x, T y, T) const {
    const T difference = x - y;
    const T at_most = difference > delta ? delta : difference;
    const T in_x = at_most < -delta ? -delta : at_most;
    return {in_x, -in_x, T(0)};
  }
};

template <typename T>
struct GaussianNll {
  T eps, constant;
  explicit GaussianNll(const Inputs& in)
      : eps(static_cast<T>(in.parameter)),
        constant(in.full ? T(0.5 * 1.83787706640934548356) : T(0)) {}  // log(2 pi)

  SQLOSS_INLINE T loss(T x, T y, T var) const {
    const T v = clamped(var);
    return T(0.5) * (core::CPU_CAPABILITY::log(v) + (x - y) * ((x - y) / v)) + constant;
  }
  SQLOSS_INLINE Derivatives<T> derivatives(T x, T y, T var) const {
    const T v = clamped(var);
    const T in_x = (x - y) / v;
    return {in_x, -in_x, T(0.5) * (T(1) - in_x * (x - y)) / v};
  }

 private:
  SQLOSS_INLINE T clamped(T var) const { return var < eps ? eps : var; }
};

// f(make) for a loss, where make(T(), inputs) is its functions on Ts.
template <typename F>
void for_loss(Loss loss, const F& f) {
  switch (loss) {
    case Loss::kBinaryCrossEntropyWithLogits:
      return f([](auto zero, const Inputs& in) {
        return BinaryCrossEntropyWithLogits<decltype(zero)>(in);
      });
    case Loss::kMse:
      return f([](auto zero, const Inputs& in) { return Mse<decltype(zero)>(in); });
    case Loss::kSmoothL1:
      return f([](auto zero, const Inputs& in) { return SmoothL1<decltype(zero)>(in); });
    case Loss::kHuber:
      return f([](auto zero, const Inputs& in) { return Huber<decltype(zero)>(in); });
    case Loss::kGaussianNll:
      return f([](auto zero, const Inputs& in) { return GaussianNll<decltype(zero)>(in); });
  }
}

// A gradient of 0 takes all with it, also what is not finite.
template <typename T>
SQLOSS_INLINE T chain(T grad, T scale, T derivative) {
  const T product = scale * derivative;
  return grad == T(0) ? T(0) : product;
}

}  // namespace sqloss::pointwise_losses::CPU_CAPABILITY
