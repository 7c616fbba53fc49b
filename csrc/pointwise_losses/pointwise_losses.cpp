// From tensors to the kernels' sequences: everything of the pointwise losses that is neither kernel
// nor autograd.
#include <c10/core/DeviceGuard.h>

#include <numeric>
#include <utility>

#include "core/allocate.h"
#include "core/tensors.h"
#include "pointwise_losses/operators.h"
#include "superquantile/fused_tail_outputs.h"

namespace sqloss::pointwise_losses {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check(const char* name, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK_TYPE(core::has_kernels(tensor.scalar_type()), "pointwise_losses: ", name,
                   ": expected float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == input.sizes(), "pointwise_losses: ", name,
                    ": expected the shape of input ", input.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == input.device(), "pointwise_losses: ", name,
                    ": expected the device of input ", input.device(), ", got ", tensor.device());
}

// The tensors of one call as sequences: samples in their order, the elements of each in that of
// input's memory, so that it and its gradient are read and written as they lie.
struct Sequences {
  Inputs inputs;
  at::ScalarType dtype = at::kFloat;
  at::DimVector order;

  Sequences(std::string_view loss, const at::Tensor& input, const at::Tensor& target,
            const OptionalTensor& weight, const OptionalTensor& other, double parameter, bool full,
            int64_t sample_dims, bool mean) {
    inputs.loss = loss_named(loss);
    inputs.parameter = parameter;
    inputs.full = full;
    const bool has_other = inputs.loss == Loss::kGaussianNll;
    const bool may_have_other = has_other || inputs.loss == Loss::kBinaryCrossEntropyWithLogits;
    TORCH_CHECK_VALUE(other ? may_have_other : !has_other, "pointwise_losses: other: expected ",
                      has_other ? "a tensor" : "none", " for ", loss);
    TORCH_CHECK_VALUE(1 <= sample_dims && sample_dims <= input.dim(),
                      "pointwise_losses: sample_dims: expected 1 to ", input.dim(),
                      " for input of shape ", input.sizes(), ", got ", sample_dims);
    check("input", input, input);
    check("target", target, input);
    if (weight) check("weight", *weight, input);
    if (other) check("other", *other, input);

    order.resize(input.dim());
    std::iota(order.begin(), order.end(), 0);
    if (!input.is_contiguous() && input.is_non_overlapping_and_dense()) {
      std::stable_sort(order.begin() + sample_dims, order.end(),
                       [&](int64_t a, int64_t b) { return input.stride(a) > input.stride(b); });
    }
    inputs.samples = c10::multiply_integers(input.sizes().slice(0, sample_dims));
    inputs.elements = c10::multiply_integers(input.sizes().slice(sample_dims));
    inputs.divisor = mean ? static_cast<double>(inputs.elements) : 1.0;
    inputs.input = sequence(input);
    inputs.target = sequence(target);
    if (weight) inputs.weight = sequence(*weight);
    if (other) inputs.other = sequence(*other);
  }

  core::Strided sequence(const at::Tensor& tensor) {
    if (tensor.scalar_type() == at::kDouble) dtype = at::kDouble;
    return core::strided(tensor, order);
  }
};

}  // namespace

Loss loss_named(std::string_view name) {
  static constexpr std::pair<std::string_view, Loss> kLosses[] = {
      {"binary_cross_entropy_with_logits", Loss::kBinaryCrossEntropyWithLogits},
      {"mse", Loss::kMse},
      {"smooth_l1", Loss::kSmoothL1},
      {"huber", Loss::kHuber},
      {"gaussian_nll", Loss::kGaussianNll},
  };
  for (const auto& [known, loss] : kLosses) {
    if (known == name) return loss;
  }
  TORCH_CHECK_VALUE(false, "pointwise_losses: loss: expected the name of one, got '", name, "'");
}

at::Tensor forward(const Kernels& kernels, std::string_view loss, const at::Tensor& input,
                   const at::Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& other, double parameter, bool full, int64_t sample_dims,
                   bool mean) {
  const c10::OptionalDeviceGuard guard(input.device());
  const Sequences sequences(loss, input, target, weight, other, parameter, full, sample_dims, mean);
  at::Tensor losses = core::empty(input.sizes().slice(0, sample_dims), sequences.dtype, input);
  if (sequences.inputs.elements == 0) {  // no tile of a sample
    losses.fill_(0.0 / sequences.inputs.divisor);
  } else if (losses.numel() > 0) {
    kernels.forward(sequences.inputs, core::dtype_of(sequences.dtype), losses.data_ptr(), nullptr);
  }
  return losses;
}

CvarOutputs forward_cvar(const Kernels& kernels, const at::Tensor& tail_fraction,
                         const OptionalTensor& extra, std::string_view loss,
                         const at::Tensor& input, const at::Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& other,
                         double parameter, bool full, int64_t sample_dims, bool mean) {
  const c10::OptionalDeviceGuard guard(input.device());
  const Sequences sequences(loss, input, target, weight, other, parameter, full, sample_dims, mean);
  const int64_t elements = sequences.inputs.elements;
  TORCH_CHECK_VALUE(1 <= elements && elements <= kMostFusedElements,
                    "pointwise_losses_cvar: input: expected samples of 1 to ", kMostFusedElements,
                    " elements, got ", elements);
  at::Tensor losses = core::empty(input.sizes().slice(0, sample_dims), sequences.dtype, input);
  const superquantile::FusedTailOutputs outputs("pointwise_losses_cvar", tail_fraction, extra,
                                                losses);
  kernels.forward(sequences.inputs, core::dtype_of(sequences.dtype), losses.data_ptr(),
                  &outputs.tail);
  return {outputs.value, std::move(losses), outputs.threshold, outputs.counts};
}

InputGradients backward(const Kernels& kernels, const at::Tensor& grad_losses,
                        std::string_view loss, const at::Tensor& input, const at::Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& other, double parameter,
                        bool full, int64_t sample_dims, bool mean,
                        std::array<bool, 3> output_mask) {
  const c10::OptionalDeviceGuard guard(input.device());
  Sequences sequences(loss, input, target, weight, other, parameter, full, sample_dims, mean);
  TORCH_CHECK_VALUE(
      grad_losses.sizes() == input.sizes().slice(0, sample_dims) &&
          grad_losses.scalar_type() == sequences.dtype && grad_losses.device() == input.device(),
      "pointwise_losses_backward: grad_losses: expected ", sequences.dtype, " of shape ",
      input.sizes().slice(0, sample_dims), " on ", input.device(), ", got ",
      grad_losses.scalar_type(), " of shape ", grad_losses.sizes(), " on ", grad_losses.device());
  TORCH_CHECK_VALUE(!output_mask[2] || sequences.inputs.loss == Loss::kGaussianNll,
                    "pointwise_losses_backward: output_mask: expected no gradient of other for ",
                    loss);
  Gradients gradients;
  const auto gradient = [&](const at::Tensor& of, bool wanted,
                            core::Strided& sequence) -> at::Tensor {
    if (!wanted) return core::empty({0}, input.scalar_type(), input);
    at::Tensor grad = core::empty_like(of);
    sequence = core::strided(grad, sequences.order);
    return grad;
  };
  InputGradients outputs{gradient(input, output_mask[0], gradients.input),
                         gradient(target, output_mask[1], gradients.target),
                         gradient(other ? *other : input, output_mask[2], gradients.other)};
  const bool any = output_mask[0] || output_mask[1] || output_mask[2];
  if (any && input.numel() > 0) {
    kernels.backward(sequences.inputs, core::dtype_of(sequences.dtype),
                     grad_losses.contiguous().data_ptr(), gradients);
  }
  return outputs;
}

}  // namespace sqloss::pointwise_losses
