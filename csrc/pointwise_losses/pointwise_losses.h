// Losses of samples that are sums or means of element losses: what their kernels take and promise.
//
// With x, y and o an element of input, target and other, its loss is
//
//   binary_cross_entropy_with_logits
//                 (1 - y) * softplus(x) + o * y * softplus(-x), o the pos_weight
//   mse           (x - y)^2
//   smooth_l1     (x - y)^2 / (2 beta) if |x - y| < beta, else |x - y| - beta / 2
//   huber         (x - y)^2 / 2 if |x - y| < delta, else delta * (|x - y| - delta / 2)
//   gaussian_nll  (log v + (x - y)^2 / v) / 2, v = max(o, eps), o the var;
//                 and log(2 pi) / 2 more if `full`
//
// times its weight. The derivative of gaussian_nll in var is taken as if it were not clamped.
// Elements are computed in float, or in double where one of the tensors is of it; sums are in
// double and in an order that depends on sizes and strides alone: the same bits on every
// repetition, for any number of threads and any CPU capability (but those without fused
// multiply-add). The CPU and GPUs of different architectures may differ in the last places.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/kernels.h"
#include "core/strided.h"
#include "superquantile/fused_tail.h"

namespace sqloss::pointwise_losses {

enum class Loss { kBinaryCrossEntropyWithLogits, kMse, kSmoothL1, kHuber, kGaussianNll };

// Samples of more elements are not each for one block, which leaves losses to add after all blocks.
constexpr int64_t kMostFusedElements = 8192;

// Tensors as sequences of samples * elements numbers. Absent weight and other are ones.
struct Inputs {
  Loss loss;
  double parameter;  // beta, delta or eps
  bool full;
  int64_t samples, elements;
  double divisor;  // a sample's loss is its sum over this
  core::Strided input, target, weight, other;
};

// The gradients wanted, in the sequence of the inputs; the others absent.
struct Gradients {
  core::Strided input, target, other;
};

// The kernels of one CPU capability, or of CUDA: on the current stream of the current device.
// `dtype` is that of the computation, the losses and their gradient [samples].
struct Kernels {
  // On CUDA finds the tail of up to kMostFusedLosses of up to kMostFusedElements each as well;
  // null: none is wanted.
  void (*forward)(const Inputs&, core::Dtype dtype, void* losses, const superquantile::FusedTail*);
  // Samples of zero gradient get zeros, whatever is in them. They are not read, but where short
  // ones share a tile of the CPU with others.
  void (*backward)(const Inputs&, core::Dtype dtype, const void* grad_losses, const Gradients&);
};

SQLOSS_DECLARE_KERNELS

}  // namespace sqloss::pointwise_losses
