// Autograd of the cross-entropy. The only file that knows both directions.
//
// As for the pointwise losses, the gradient is the backward operator's, and where that shall be
// differentiated, it and the tangents of forward mode are formulas of differentiable operators.
#include "core/autograd.h"

#include <torch/library.h>

#include "core/on.h"
#include "cross_entropy_losses/cross_entropy_losses.h"
#include "superquantile/superquantile.h"

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

  Outputs losses() const {
    static const auto op =
        core::find_operator<core::Operator<decltype(forward)>>("sqloss::cross_entropy_losses");
    return op.call(input, target, weight, ignore_index, label_smoothing);
  }

  at::Tensor gradient(const at::Tensor& grad_losses, const at::Tensor& log_sum_exp) const {
    static const auto op = core::find_operator<core::Operator<decltype(backward)>>(
        "sqloss::cross_entropy_losses_backward");
    return op.call(grad_losses, input, target, weight, log_sum_exp, ignore_index, label_smoothing);
  }

  // Of the samples that are not ignored, where some may be.
  OptionalTensor mask() const {
    if (target.is_floating_point()) return std::nullopt;
    return target != ignore_index;
  }

  void refuse_gradients() const {
    core::refuse_gradient("cross_entropy", "target", target);
    core::refuse_gradient("cross_entropy", "weight", weight);
  }

  // Of a sample's loss in its logits `x`: softmax(x) * sum of t - t.
  at::Tensor derivative(const at::Tensor& x) const {
    const at::Tensor logits = x.to(dtype());
    const bool probabilities = target.is_floating_point();
    const at::Tensor index = probabilities ? at::Tensor() : target.unsqueeze(1);
    const at::Tensor ignored = probabilities ? at::Tensor() : index == ignore_index;
    const at::Tensor hits = probabilities ? target.to(dtype())
                                          : at::zeros_like(logits).scatter(
                                                1, index.masked_fill(ignored, 0), at::Scalar(1));
    at::Tensor t = (1 - label_smoothing) * hits +
                   at::full_like(hits, label_smoothing) / at::Scalar(input.sym_size(1));
    if (weight) {
      at::Tensor of_class = weight->to(dtype());
      for (int64_t d = 2; d < input.dim(); ++d) of_class = of_class.unsqueeze(-1);
      t = t * of_class;
    }
    const at::Tensor result = at::softmax(logits, 1) * t.sum(1, /*keepdim=*/true) - t;
    return probabilities ? result : result.masked_fill(ignored, 0);
  }

  // The gradient, differentiable in grad_losses and input.
  at::Tensor differentiable_gradient(const at::Tensor& grad_losses) const {
    const at::Tensor grad = grad_losses.unsqueeze(1);
    const at::Tensor in_x = derivative(input);
    // Only a derivative that is not finite is masked: the gradient moves with that of a loss also
    // from 0.
    const at::Tensor masked = (grad == 0).logical_and(in_x.isfinite().logical_not());
    return (grad * in_x.masked_fill(masked, 0)).to(input.scalar_type());
  }

  at::Tensor losses_tangent() const {
    return (derivative(core::primal(input)) * core::tangent(input)->to(dtype())).sum(1);
  }

 private:
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
  static const at::Tensor& log_sum_exp_of(const variable_list& saved) { return saved[3]; }

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
    if (!grads[0].defined() || !task_should_compute_output(0)) return {at::Tensor()};
    const auto saved = unpack();
    return {call_of(saved).gradient(grads[0], log_sum_exp_of(saved))};
  }
  std::string name() const override { return "CrossEntropyLossesBackward"; }
};

// From the gradient of the tail's value to those of extra and input.
struct CrossEntropyLossesCvarBackward final : CallNode {
  void save(const Call& call, const CvarOutputs& outputs) {
    const auto& [value, losses, log_sum_exp, threshold, counts] = outputs;
    CallNode::save(call, log_sum_exp);
    SavingNode::save({losses, threshold, counts});
  }

  variable_list apply(variable_list&& grads) override {
    variable_list gradients(2);
    if (!grads[0].defined()) return gradients;
    static const auto op = core::find_operator<core::Operator<decltype(superquantile::backward)>>(
        "sqloss::superquantile_backward");
    const auto saved = unpack();
    const Call call = call_of(saved);
    const at::Tensor grad_losses = op.call(grads[0], {}, saved[kMore], {}, call.mask(),
                                           saved[kMore + 1], saved[kMore + 2], {}, false);
    if (task_should_compute_output(0)) gradients[0] = grad_losses;
    if (task_should_compute_output(1)) {
      gradients[1] = call.gradient(grad_losses, log_sum_exp_of(saved));
    }
    return gradients;
  }
  std::string name() const override { return "CrossEntropyLossesCvarBackward"; }
};

Outputs forward_autograd(const at::Tensor& input, const at::Tensor& target,
                         const OptionalTensor& weight, int64_t ignore_index,
                         double label_smoothing) {
  const Call call{input, target, weight, ignore_index, label_smoothing};
  call.refuse_gradients();
  const Outputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call.losses();
  }();
  const auto& [losses, log_sum_exp] = outputs;
  if (torch::autograd::isFwGradDefined(input)) core::set_tangent(losses, call.losses_tangent());
  if (torch::autograd::compute_requires_grad(input)) {
    const auto node = core::make_node<CrossEntropyLossesBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input));
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
  call.refuse_gradients();
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(extra) && !torch::autograd::isFwGradDefined(input),
      "cross_entropy_losses_cvar: expected tensors without tangents (forward-mode derivatives are "
      "those of cross_entropy_losses and superquantile)");
  CvarOutputs outputs = [&] {
    static const auto op = core::find_operator<core::Operator<decltype(forward_cvar)>>(
        "sqloss::cross_entropy_losses_cvar");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(tail_fraction, extra, input, target, weight, ignore_index, label_smoothing);
  }();
  if (torch::autograd::compute_requires_grad(extra, input)) {
    const auto node = core::make_node<CrossEntropyLossesCvarBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(extra, input));
    node->save(call, outputs);
    torch::autograd::set_history(std::get<0>(outputs), node);
  }
  return outputs;
}

at::Tensor backward_autograd(const at::Tensor& grad_losses, const at::Tensor& input,
                             const at::Tensor& target, const OptionalTensor& weight,
                             const at::Tensor& log_sum_exp, int64_t ignore_index,
                             double label_smoothing) {
  const Call call{input, target, weight, ignore_index, label_smoothing};
  call.refuse_gradients();
  if (torch::autograd::compute_requires_grad(grad_losses, input) ||
      torch::autograd::isFwGradDefined(grad_losses) || torch::autograd::isFwGradDefined(input)) {
    return call.differentiable_gradient(grad_losses);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call.gradient(grad_losses, log_sum_exp);
}

}  // namespace

TORCH_LIBRARY_IMPL(sqloss, Autograd, m) {
  m.impl("cross_entropy_losses", forward_autograd);
  m.impl("cross_entropy_losses_backward", backward_autograd);
  m.impl("cross_entropy_losses_cvar", forward_cvar_autograd);
}

}  // namespace sqloss::cross_entropy_losses
