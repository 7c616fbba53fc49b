// The operators of the cross-entropy: from tensors to kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/choose_kernels.h"
#include "cross_entropy_losses/cross_entropy_losses.h"

namespace sqloss::cross_entropy_losses {

SQLOSS_CHOOSE_KERNELS

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
