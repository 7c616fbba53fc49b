// The operators of Student-t samples: from tensors to kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/choose_kernels.h"
#include "student_t/student_t.h"

namespace sqloss::student_t {

SQLOSS_CHOOSE_KERNELS

// By their names; raise ValueError.
Parameterization parameterization_named(std::string_view name);
Kl kl_named(std::string_view name);

// From tensors to kernels. loc and scale have one shape [..., columns]; df and prior_df that too,
// or [columns], or none; seed broadcasts to the shape [...], which rows has. Strides are any. No
// num_samples is one sample, without a dimension of its own in z and kl. Outputs that are not
// wanted are empty.
using Outs = std::tuple<at::Tensor, at::Tensor>;  // z, kl
Outs forward(const Kernels&, const std::optional<at::Tensor>& df, const at::Tensor& loc,
             const at::Tensor& scale, const std::optional<at::Tensor>& prior_df,
             const at::Tensor& seed, const std::optional<at::Tensor>& rows,
             std::optional<int64_t> num_samples, std::string_view parameterization,
             std::string_view kl, bool kl_mean, bool return_z);

// The gradients of df, loc, scale and prior_df that output_mask wants; without a prior_df, that of
// df holds both.
using InputGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
InputGradients backward(const Kernels&, const std::optional<at::Tensor>& grad_z,
                        const std::optional<at::Tensor>& grad_kl,
                        const std::optional<at::Tensor>& df, const at::Tensor& loc,
                        const at::Tensor& scale, const std::optional<at::Tensor>& prior_df,
                        const at::Tensor& seed, const std::optional<at::Tensor>& rows,
                        std::optional<int64_t> num_samples, std::string_view parameterization,
                        std::string_view kl, bool kl_mean, std::array<bool, 4> output_mask);

// The random numbers of the samples, -2 log(u) and cos(2 pi v), of the dtype and with the shape of
// loc, after num_samples: for derivatives beyond those of backward.
using NoiseTensors = std::tuple<at::Tensor, at::Tensor>;  // energy, cosine
NoiseTensors noise(const Kernels&, const at::Tensor& loc, const at::Tensor& seed,
                   const std::optional<at::Tensor>& rows, std::optional<int64_t> num_samples);

// A seed, int64 of no dimension on the device: 64 random bits of the generator, or of the device's
// own.
at::Tensor draw_seed(const std::optional<at::Generator>& generator, at::Device device);
at::Tensor draw_seed_by_torch(const std::optional<at::Generator>& generator, at::Device device);

}  // namespace sqloss::student_t
