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

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

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
  void (*forward)(const Inputs&, at::ScalarType dtype, void* losses, double* log_sum_exp,
                  const superquantile::FusedTail*);
  // Samples of zero gradient get zeros, whatever is in them. They are not read, but by class beside
  // samples that have a gradient.
  void (*backward)(const Inputs&, at::ScalarType dtype, const void* grad_losses,
                   const double* log_sum_exp, const Classes& grad_input);
  // The same for the gradient of the probabilities.
  void (*target_backward)(const Inputs&, at::ScalarType dtype, const void* grad_losses,
                          const double* log_sum_exp, const Classes& grad_target);
};

SQLOSS_DECLARE_KERNELS

// From tensors to kernels. input is [N, C, d1, ...], of any strides, which are never copied; target
// int64 [N, d1, ...] or of input's shape; weight [C]. Returns losses [N, d1, ...] and log_sum_exp
// of that shape, in float64 because it is subtracted from logits of any size. Errors about the
// values of target name `function`.
using Outputs = std::tuple<at::Tensor, at::Tensor>;
Outputs forward(const Kernels&, const at::Tensor& input, const at::Tensor& target,
                const std::optional<at::Tensor>& weight, int64_t ignore_index,
                double label_smoothing, std::string_view function);

// The losses + extra and the tail of those that are not ignored, in one. `extra` has the shape and
// dtype of the losses. Returns value, losses, log_sum_exp, threshold, counts.
using CvarOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
CvarOutputs forward_cvar(const Kernels&, const at::Tensor& tail_fraction,
                         const std::optional<at::Tensor>& extra, const at::Tensor& input,
                         const at::Tensor& target, const std::optional<at::Tensor>& weight,
                         int64_t ignore_index, double label_smoothing);

// The gradients of input and of target, which must be probabilities for it, that output_mask wants;
// the others are empty.
using InputGradients = std::tuple<at::Tensor, at::Tensor>;
InputGradients backward(const Kernels&, const at::Tensor& grad_losses, const at::Tensor& input,
                        const at::Tensor& target, const std::optional<at::Tensor>& weight,
                        const at::Tensor& log_sum_exp, int64_t ignore_index, double label_smoothing,
                        std::array<bool, 2> output_mask);

}  // namespace sqloss::cross_entropy_losses
