// The operators of the pointwise losses: from tensors to kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/choose_kernels.h"
#include "pointwise_losses/pointwise_losses.h"

namespace sqloss::pointwise_losses {

SQLOSS_CHOOSE_KERNELS

// The loss of this name; raises ValueError.
Loss loss_named(std::string_view name);

// From tensors to kernels. All tensors are of one shape and of any strides, which are never copied;
// its first `sample_dims` dimensions are those of the samples and of the losses returned.
at::Tensor forward(const Kernels&, std::string_view loss, const at::Tensor& input,
                   const at::Tensor& target, const std::optional<at::Tensor>& weight,
                   const std::optional<at::Tensor>& other, double parameter, bool full,
                   int64_t sample_dims, bool mean);

// The losses + extra and their tail in one. `extra` has the shape and dtype of the losses.
using CvarOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;  // value, losses, threshold, counts
CvarOutputs forward_cvar(const Kernels&, const at::Tensor& tail_fraction,
                         const std::optional<at::Tensor>& extra, std::string_view loss,
                         const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& other, double parameter, bool full,
                         int64_t sample_dims, bool mean);

// The gradients of input, target and other that output_mask wants; the others are empty.
using InputGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
InputGradients backward(const Kernels&, const at::Tensor& grad_losses, std::string_view loss,
                        const at::Tensor& input, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& other, double parameter, bool full,
                        int64_t sample_dims, bool mean, std::array<bool, 3> output_mask);

}  // namespace sqloss::pointwise_losses
