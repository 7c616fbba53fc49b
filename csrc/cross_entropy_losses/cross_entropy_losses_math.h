// The formulas of cross_entropy_losses.h on single numbers, for CPU and CUDA kernels.
//
// Of a sample are known m, the maximum of its logits or kLowest if that is more, and log_sum, the
// logarithm of the sum of exp(x - m).
//
// In the namespace of who includes it: a csrc/*/cpu.cpp, once per CPU capability, or a cuda.cu.
#pragma once

#include <limits>

#include "core/inline.h"

namespace sqloss::cross_entropy_losses::CPU_CAPABILITY {

// So that -inf - -inf is never computed.
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();

// t of a class that is not the target.
template <typename T>
SQLOSS_INLINE T coefficient(T probability, T weight, T kept, T smoothing) {
  return (kept * probability + smoothing) * weight;
}

// NaN where m is infinite, as the softmax is.
SQLOSS_INLINE double log_sum_exp_of(double m, double log_sum) { return (m - m) + m + log_sum; }

// The target class's part of the loss, of weight (1 - label_smoothing) * weight[target].
SQLOSS_INLINE double loss_of_target(double weight, double logit, double m, double log_sum) {
  return weight * ((m - logit) + log_sum);
}

// A sample's gradient by its factors.
template <typename T>
struct Scale {
  T grad;       // of its loss
  T sum;        // of t
  T high, low;  // log_sum_exp in two parts

  Scale() = default;
  SQLOSS_INLINE Scale(T grad_loss, double sum_t, double log_sum_exp)
      : grad(grad_loss),
        sum(static_cast<T>(sum_t)),
        high(static_cast<T>(log_sum_exp)),
        low(static_cast<T>(log_sum_exp - static_cast<double>(high))) {}

  // Of the softmax.
  SQLOSS_INLINE T exponent(T logit) const { return (logit - high) - low; }

  SQLOSS_INLINE T gradient(T softmax, T t) const { return grad * (sum * softmax - t); }

  // Of a probability that its coefficient has times `factor`.
  SQLOSS_INLINE T target_gradient(T logit, T factor) const {
    return grad * (factor * -exponent(logit));
  }
};

}  // namespace sqloss::cross_entropy_losses::CPU_CAPABILITY
