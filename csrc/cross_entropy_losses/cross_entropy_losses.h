// Cross-entropy of samples, one loss each: what its kernels take and promise.
//
// With logits x [classes] of a sample, log_sum_exp = log(sum of exp(x)), and coefficients t,
//
//   loss = sum over c of t[c] * (log_sum_exp - x[c])
//   t[c] = (1 - label_smoothing) * weight[c] * (c == target) + label_smoothing / C * weight[c]
//   t[c] = ((1 - label_smoothing) * target[c] + label_smoothing / C) * weight[c]
//
// for a target class and for target probabilities. Without label smoothing, classes that are not
// the target class may have the logit -inf; a probability of 0 times an infinite term is NaN, as in
// torch. Where the target class is ignore_index the loss is 0, as is its gradient.
// Logits are computed in float, or in double where one of the tensors is of it. The same bits for
// any number of threads, repetition and capability (but for those without fused multiply-add).
#pragma once

#include <cstdint>
#include <string_view>

#include "core/dtype.h"
#include "core/kernels.h"
#include "core/strided.h"
#include "superquantile/fused_tail.h"

namespace sqloss::cross_entropy_losses {

// One number per class of each sample: `first` are those of class 0, in the order of the samples.
struct Classes {
  core::Strided first;
  int64_t stride = 0;  // from a class to the next, in elements
};

struct Inputs {
  int64_t samples, classes;  // at least 1 class
  Classes input;
  core::Strided target;   // int64, or absent
  Classes probabilities;  // or absent
  const void* weight;     // [classes] of the computation's dtype; null: ones
  int64_t ignore_index;
  double label_smoothing;
  std::string_view function;  // that was called, as errors on the CPU name it
};

// The kernels of one CPU capability, or of CUDA: on the current stream of the current device.
// `dtype` is that of the computation, the losses and their gradient [samples]. A target that is no
// class is an IndexError, on CUDA a device-side assertion.
struct Kernels {
  // On CUDA finds the tail of up to kMostFusedLosses as well, of samples that are not ignored;
  // null: none is wanted.
  void (*forward)(const Inputs&, core::Dtype dtype, void* losses, double* log_sum_exp,
                  const superquantile::FusedTail*);
  // Samples of zero gradient get zeros, whatever is in them. They are not read, but by class beside
  // samples that have a gradient.
  void (*backward)(const Inputs&, core::Dtype dtype, const void* grad_losses,
                   const double* log_sum_exp, const Classes& grad_input);
  // The same for the gradient of the probabilities.
  void (*target_backward)(const Inputs&, core::Dtype dtype, const void* grad_losses,
                          const double* log_sum_exp, const Classes& grad_target);
};

SQLOSS_DECLARE_KERNELS

}  // namespace sqloss::cross_entropy_losses
