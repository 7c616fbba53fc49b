// From tensors to the kernels' samples and classes: everything of the cross-entropy that is neither
// kernel nor autograd.
#include <c10/util/irange.h>

#include "core/allocate.h"
#include "core/tensors.h"
#include "cross_entropy_losses/operators.h"
#include "superquantile/fused_tail_outputs.h"

namespace sqloss::cross_entropy_losses {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::DimVector sample_sizes(const at::Tensor& input) {
  at::DimVector sizes(input.sizes().begin(), input.sizes().end());
  sizes.erase(sizes.begin() + 1);
  return sizes;
}

void check_floating(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(core::has_kernels(tensor.scalar_type()), "cross_entropy: ", name,
                   ": expected float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
}

void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                 const at::Tensor& input) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, "cross_entropy: ", name, ": expected shape ", sizes,
                    " for input of shape ", input.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == input.device(), "cross_entropy: ", name,
                    ": expected the device of input ", input.device(), ", got ", tensor.device());
}

// A tensor [N, C, d1, ...] by class and sample.
Classes by_class(const at::Tensor& tensor) {
  at::DimVector order;
  for (const int64_t d : c10::irange(tensor.dim())) {
    if (d != 1) order.push_back(d);
  }
  return {core::strided(tensor, order), tensor.stride(1)};
}

// The tensors of one call as the kernels take them.
struct Samples {
  Inputs inputs;
  at::ScalarType dtype = at::kFloat;
  at::DimVector sizes;
  at::Tensor weight;  // owns inputs.weight

  Samples(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight_,
          int64_t ignore_index, double label_smoothing, std::string_view function) {
    TORCH_CHECK_VALUE(input.dim() >= 2, "cross_entropy: input: expected shape [N, C, ...], got ",
                      input.sizes());
    sizes = sample_sizes(input);
    check_floating("input", input);
    const bool probabilities = target.is_floating_point();
    TORCH_CHECK_TYPE(probabilities || target.scalar_type() == at::kLong,
                     "cross_entropy: target: expected int64 classes or floating-point ",
                     "probabilities, got ", target.scalar_type());
    check_shape("target", target, probabilities ? input.sizes() : at::IntArrayRef(sizes), input);
    if (probabilities) check_floating("target", target);
    if (weight_) {
      check_floating("weight", *weight_);
      check_shape("weight", *weight_, input.sizes().slice(1, 1), input);
    }
    TORCH_CHECK_VALUE(0 <= label_smoothing && label_smoothing <= 1,
                      "cross_entropy: label_smoothing: expected a number in [0, 1], got ",
                      label_smoothing);
    const auto is_double = [](const at::Tensor& t) { return t.scalar_type() == at::kDouble; };
    if (is_double(input) || is_double(target) || (weight_ && is_double(*weight_))) {
      dtype = at::kDouble;
    }
    inputs.samples = c10::multiply_integers(sizes);
    inputs.classes = input.size(1);
    TORCH_CHECK_VALUE(inputs.classes > 0 || inputs.samples == 0,
                      "cross_entropy: input: expected at least one class, got shape ",
                      input.sizes());
    inputs.input = by_class(input);
    if (probabilities) {
      inputs.probabilities = by_class(target);
    } else {
      at::DimVector order(target.dim());
      for (const int64_t d : c10::irange(target.dim())) order[d] = d;
      inputs.target = core::strided(target, order);
    }
    if (weight_) weight = weight_->to(dtype).contiguous();
    inputs.weight = weight_ ? weight.data_ptr() : nullptr;
    inputs.ignore_index = ignore_index;
    inputs.label_smoothing = label_smoothing;
    inputs.function = function;
  }
};

}  // namespace

Outputs forward(const Kernels& kernels, const at::Tensor& input, const at::Tensor& target,
                const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                std::string_view function) {
  const c10::OptionalDeviceGuard guard(input.device());
  const Samples samples(input, target, weight, ignore_index, label_smoothing, function);
  Outputs outputs{core::empty(samples.sizes, samples.dtype, input),
                  core::empty(samples.sizes, at::kDouble, input)};
  const auto& [losses, log_sum_exp] = outputs;
  if (samples.inputs.samples > 0) {
    kernels.forward(samples.inputs, core::dtype_of(samples.dtype), losses.data_ptr(),
                    static_cast<double*>(log_sum_exp.data_ptr()), nullptr);
  }
  return outputs;
}

CvarOutputs forward_cvar(const Kernels& kernels, const at::Tensor& tail_fraction,
                         const OptionalTensor& extra, const at::Tensor& input,
                         const at::Tensor& target, const OptionalTensor& weight,
                         int64_t ignore_index, double label_smoothing) {
  const c10::OptionalDeviceGuard guard(input.device());
  constexpr const char* kName = "cross_entropy_losses_cvar";
  const Samples samples(input, target, weight, ignore_index, label_smoothing, kName);
  at::Tensor losses = core::empty(samples.sizes, samples.dtype, input);
  at::Tensor log_sum_exp = core::empty(samples.sizes, at::kDouble, input);
  const superquantile::FusedTailOutputs outputs(kName, tail_fraction, extra, losses);
  kernels.forward(samples.inputs, core::dtype_of(samples.dtype), losses.data_ptr(),
                  static_cast<double*>(log_sum_exp.data_ptr()), &outputs.tail);
  return {outputs.value, std::move(losses), std::move(log_sum_exp), outputs.threshold,
          outputs.counts};
}

InputGradients backward(const Kernels& kernels, const at::Tensor& grad_losses,
                        const at::Tensor& input, const at::Tensor& target,
                        const OptionalTensor& weight, const at::Tensor& log_sum_exp,
                        int64_t ignore_index, double label_smoothing,
                        std::array<bool, 2> output_mask) {
  const c10::OptionalDeviceGuard guard(input.device());
  constexpr const char* kName = "cross_entropy_losses_backward";
  const Samples samples(input, target, weight, ignore_index, label_smoothing, kName);
  const auto check = [&](const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
    TORCH_CHECK_VALUE(tensor.sizes() == at::IntArrayRef(samples.sizes) &&
                          tensor.scalar_type() == dtype && tensor.device() == input.device(),
                      kName, ": ", name, ": expected ", dtype, " of shape ",
                      at::IntArrayRef(samples.sizes), " on ", input.device(), ", got ",
                      tensor.scalar_type(), " of shape ", tensor.sizes(), " on ", tensor.device());
  };
  check("grad_losses", grad_losses, samples.dtype);
  check("log_sum_exp", log_sum_exp, at::kDouble);
  TORCH_CHECK_VALUE(!output_mask[1] || target.is_floating_point(), kName,
                    ": output_mask: expected no gradient of classes");
  const at::Tensor grads = grad_losses.contiguous(), exponents = log_sum_exp.contiguous();
  const auto gradient = [&](const at::Tensor& of, bool wanted, const auto& kernel) {
    if (!wanted) return core::empty({0}, input.scalar_type(), input);
    at::Tensor grad = core::empty_like(of);
    if (grad.numel() > 0) {
      kernel(samples.inputs, core::dtype_of(samples.dtype), grads.data_ptr(),
             static_cast<const double*>(exponents.data_ptr()), by_class(grad));
    }
    return grad;
  };
  return {gradient(input, output_mask[0], kernels.backward),
          gradient(target, output_mask[1], kernels.target_backward)};
}

}  // namespace sqloss::cross_entropy_losses
