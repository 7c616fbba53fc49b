// The operators of the superquantile: from tensors to kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "core/choose_kernels.h"
#include "superquantile/superquantile.h"

namespace sqloss::superquantile {

SQLOSS_CHOOSE_KERNELS

// From tensors to kernels. `dim` lists the reduced dimensions (non-negative, none twice; empty:
// all); weight and mask have the shape of losses; tail_fraction is a 0-dim float64 tensor.
// Errors name `function`, and read `none_counts` where no loss counts (struct Caller). Returns
// value and threshold [kept dims] in the dtype of losses and counts [kept dims, 3] in float64.
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Outputs forward(const Kernels&, const at::Tensor& losses, const at::Tensor& tail_fraction,
                const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& mask,
                at::IntArrayRef dim, bool keepdim, std::string_view function,
                std::string_view none_counts);

// The gradient of losses from those of value and threshold (either may be absent, not both).
at::Tensor backward(const Kernels&, const std::optional<at::Tensor>& grad_value,
                    const std::optional<at::Tensor>& grad_threshold, const at::Tensor& losses,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& mask,
                    const at::Tensor& threshold, const at::Tensor& counts, at::IntArrayRef dim,
                    bool keepdim);

}  // namespace sqloss::superquantile
