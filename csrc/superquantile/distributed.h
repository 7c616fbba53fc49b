// The superquantile of losses that are spread over ranks: what distributed_superquantile in
// sqloss/reference.py tells, in loops over the losses of this process, on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace sqloss::superquantile {

// Value and threshold [] in the dtype of losses, and counts [3] in float64, of all ranks; counts
// over `scale`, so that the gradient, a density, is that of the value times it.
// `all_reduce` turns an int64 tensor into its sum over them, in place. `config` are integers below
// 2^16; where some differ between ranks, `disagree` is called after the first sum with a bool
// tensor that is False for these. Errors name `function`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> distributed(
    const at::Tensor& losses, double tail_fraction, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& mask, const std::vector<int64_t>& config, int64_t ranks,
    int64_t scale, const std::function<void(const at::Tensor&)>& all_reduce,
    const std::function<void(const at::Tensor&)>& disagree, const std::string& function);

// That value as a function of the losses of this rank, which counts make its gradient in them.
at::Tensor distributed_with_gradient(const at::Tensor& value, const at::Tensor& losses,
                                     const std::optional<at::Tensor>& weight,
                                     const std::optional<at::Tensor>& mask,
                                     const at::Tensor& threshold, const at::Tensor& counts);

}  // namespace sqloss::superquantile
