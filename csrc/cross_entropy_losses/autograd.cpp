// Autograd of the cross-entropy. The only file that knows both directions.
//
// As for the pointwise losses, the gradient is the backward operator's, and where that shall be
// differentiated, it and the tangents of forward mode are formulas of differentiable operators.
#include "core/autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <string_view>

#include "core/on.h"
#include "cross_entropy_losses/operators.h"
#include "superquantile/operators.h"

namespace sqloss::cross_entropy_losses {
namespace {

using core::OptionalTensor;
using torch::autograd::variable_list;

// The losses of a call.
struct Call {
  at::Tensor input, target;
  OptionalTensor weight;
  int64_t ignore_index;
  double label_smoothing;

  Outputs losses(std::string_view function) const {
    static const auto op =
        core::find_operator<core::Operator<decltype(forward)>>("sqloss::cross_entropy_losses");
    return op.call(input, target, weight, ignore_index, label_smoothing, function);
  }

  InputGradients gradients(const at::Tensor& grad_losses, const at::Tensor& log_sum_exp,
                           std::array<bool, 2> output_mask) const {
    static const auto op = core::find_operator<core::Operator<decltype(backward)>>(
        "sqloss::cross_entropy_losses_backward");
    return op.call(grad_losses, input, target, weight, log_sum_exp, ignore_index, label_smoothing,
                   output_mask);
  }

  // Of the samples that are not ignored, where some may be.
  OptionalTensor mask() const {
    if (target.is_floating_point()) return std::nullopt;
    return target != ignore_index;
  }

  // input and target without tangents.
  Call primals() const {
    Call call = *this;
    call.input = core::primal(input);
    call.target = core::primal(target);
    return call;
  }

  // Of a sample's loss in its logits: softmax * sum of t - t.
  at::Tensor derivative() const {
    const at::Tensor logits = input.to(dtype());
    const bool probabilities = target.is_floating_point();
    const at::Tensor index = probabilities ? at::Tensor() : target.unsqueeze(1);
    const at::Tensor ignored = probabilities ? at::Tensor() : index == ignore_index;
    const at::Tensor hits = probabilities ? target.to(dtype())
                                          : at::zeros_like(logits).scatter(
                                                1, index.masked_fill(ignored, 0), at::Scalar(1));
    at::Tensor t = (1 - label_smoothing) * hits +
                   at::full_like(hits, label_smoothing) / at::Scalar(input.sym_size(1));
    if (weight) t = t * weight_of_classes();
    const at::Tensor result = at::softmax(logits, 1) * t.sum(1, /*keepdim=*/true) - t;
    return probabilities ? result : result.masked_fill(ignored, 0);
  }

  // The same in its probabilities: -log softmax, times what they have in t.
  at::Tensor target_derivative() const {
    const at::Tensor in_y = (label_smoothing - 1) * at::log_softmax(input.to(dtype()), 1);
    return weight ? in_y * weight_of_classes() : in_y;
  }

  // The gradients, differentiable in grad_losses, input and target.
  InputGradients differentiable_gradients(const at::Tensor& grad_losses,
                                          std::array<bool, 2> output_mask) const {
    const at::Tensor grad = grad_losses.unsqueeze(1);
    const auto gradient = [&](const at::Tensor& derivative, const at::Tensor& of) {
      // Only a derivative that is not finite is masked: the gradient moves with that of a loss also
      // from 0.
      const at::Tensor masked = (grad == 0).logical_and(derivative.isfinite().logical_not());
      return (grad * derivative.masked_fill(masked, 0)).to(of.scalar_type());
    };
    const auto none = [&] { return at::empty({0}, input.options()); };
    return {output_mask[0] ? gradient(derivative(), input) : none(),
            output_mask[1] ? gradient(target_derivative(), target) : none()};
  }

  // How the losses move with input and target: the adjoint of their gradients.
  at::Tensor losses_tangent() const {
    const OptionalTensor of_input = core::tangent(input), of_target = core::tangent(target);
    const Call call = primals();
    at::Tensor moved;
    if (of_input) moved = call.derivative() * of_input->to(dtype());
    if (of_target) {
      const at::Tensor by_target = call.target_derivative() * of_target->to(dtype());
      moved = moved.defined() ? moved + by_target : by_target;
    }
    return moved.sum(1);
  }

 private:
  at::Tensor weight_of_classes() const {
    at::Tensor of_class = weight->to(dtype());
    for (int64_t d = 2; d < input.dim(); ++d) of_class = of_class.unsqueeze(-1);
    return of_class;
  }
  at::ScalarType dtype() const {
    const bool is_double = input.scalar_type() == at::kDouble ||
                           target.scalar_type() == at::kDouble ||
                           (weight && weight->scalar_type() == at::kDouble);
    return is_double ? at::kDouble : at::kFloat;
  }
};

// A node that saves a call and its log_sum_exp, and maybe more tensors after those.
class CallNode : public core::SavingNode {
 public:
  void save(const Call& call, const at::Tensor& log_sum_exp) {
    SavingNode::save({call.input, call.target, call.weight, log_sum_exp.detach()});
    ignore_index_ = call.ignore_index;
    label_smoothing_ = call.label_smoothing;
  }

 protected:
  static constexpr size_t kMore = 4;  // the first tensor after those of the call

  Call call_of(const variable_list& saved) const {
    return {saved[0], saved[1], core::optional(saved[2]), ignore_index_, label_smoothing_};
  }

  // The gradients of input and target, the node's outputs from `first` on, into these.
  void add_gradients(const variable_list& saved, const at::Tensor& grad_losses, size_t first,
                     variable_list& gradients) {
    const std::array<bool, 2> wanted{task_should_compute_output(first),
                                     task_should_compute_output(first + 1)};
    if (!(wanted[0] || wanted[1])) return;
    const auto [input, target] = call_of(saved).gradients(grad_losses, saved[3], wanted);
    if (wanted[0]) gradients[first] = input;
    if (wanted[1]) gradients[first + 1] = target;
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(ignore_index_);
    args.collect(label_smoothing_);
  }

 private:
  int64_t ignore_index_ = 0;
  double label_smoothing_ = 0;
};

struct CrossEntropyLossesBackward final : CallNode {
  variable_list apply(variable_list&& grads) override {
    variable_list gradients(2);
    if (grads[0].defined()) add_gradients(unpack(), grads[0], 0, gradients);
    return gradients;
  }
  std::string name() const override { return "CrossEntropyLossesBackward"; }
};

// From the gradient of the tail's value to those of extra, input and target.
struct CrossEntropyLossesCvarBackward final : CallNode {
  void save(const Call& call, const CvarOutputs& outputs) {
    const auto& [value, losses, log_sum_exp, threshold, counts] = outputs;
    CallNode::save(call, log_sum_exp);
    SavingNode::save({losses, threshold, counts});
  }

  variable_list apply(variable_list&& grads) override {
    variable_list gradients(3);
    if (!grads[0].defined()) return gradients;
    static const auto op = core::find_operator<core::Operator<decltype(superquantile::backward)>>(
        "sqloss::superquantile_backward");
    const auto saved = unpack();
    const at::Tensor grad_losses = op.call(grads[0], {}, saved[kMore], {}, call_of(saved).mask(),
                                           saved[kMore + 1], saved[kMore + 2], {}, false);
    if (task_should_compute_output(0)) gradients[0] = grad_losses;
    add_gradients(saved, grad_losses, 1, gradients);
    return gradients;
  }
  std::string name() const override { return "CrossEntropyLossesCvarBackward"; }
};

Outputs forward_autograd(const at::Tensor& input, const at::Tensor& target,
                         const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                         std::string_view function) {
  const Call call{input, target, weight, ignore_index, label_smoothing};
  core::refuse_gradient(function, "weight", weight);
  const Outputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call.losses(function);
  }();
  const auto& [losses, log_sum_exp] = outputs;
  if (torch::autograd::isFwGradDefined(input) || torch::autograd::isFwGradDefined(target)) {
    core::set_tangent(losses, call.losses_tangent());
  }
  if (torch::autograd::compute_requires_grad(input, target)) {
    const auto node = core::make_node<CrossEntropyLossesBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, target));
    node->save(call, log_sum_exp);
    torch::autograd::set_history(losses, node);
  }
  return outputs;
}

CvarOutputs forward_cvar_autograd(const at::Tensor& tail_fraction, const OptionalTensor& extra,
                                  const at::Tensor& input, const at::Tensor& target,
                                  const OptionalTensor& weight, int64_t ignore_index,
                                  double label_smoothing) {
  const Call call{input, target, weight, ignore_index, label_smoothing};
  core::refuse_gradient("cross_entropy_losses_cvar", "weight", weight);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(extra) && !torch::autograd::isFwGradDefined(input) &&
          !torch::autograd::isFwGradDefined(target),
      "cross_entropy_losses_cvar: expected tensors without tangents (forward-mode derivatives are "
      "those of cross_entropy_losses and superquantile)");
  CvarOutputs outputs = [&] {
    static const auto op = core::find_operator<core::Operator<decltype(forward_cvar)>>(
        "sqloss::cross_entropy_losses_cvar");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(tail_fraction, extra, input, target, weight, ignore_index, label_smoothing);
  }();
  if (torch::autograd::compute_requires_grad(extra, input, target)) {
    const auto node = core::make_node<CrossEntropyLossesCvarBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(extra, input, target));
    node->save(call, outputs);
    torch::autograd::set_history(std::get<0>(outputs), node);
  }
  return outputs;
}

InputGradients backward_autograd(const at::Tensor& grad_losses, const at::Tensor& input,
                                 const at::Tensor& target, const OptionalTensor& weight,
                                 const at::Tensor& log_sum_exp, int64_t ignore_index,
                                 double label_smoothing, std::array<bool, 2> output_mask) {
  const Call call{input, target, weight, ignore_index, label_smoothing};
  core::refuse_gradient("cross_entropy_losses_backward", "weight", weight);
  if (torch::autograd::compute_requires_grad(grad_losses, input, target) ||
      torch::autograd::isFwGradDefined(grad_losses) || torch::autograd::isFwGradDefined(input) ||
      torch::autograd::isFwGradDefined(target)) {
    return call.differentiable_gradients(grad_losses, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call.gradients(grad_losses, log_sum_exp, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(sqloss, Autograd, m) {
  m.impl("cross_entropy_losses", forward_autograd);
  m.impl("cross_entropy_losses_backward", backward_autograd);
  m.impl("cross_entropy_losses_cvar", forward_cvar_autograd);
}

}  // namespace sqloss::cross_entropy_losses
