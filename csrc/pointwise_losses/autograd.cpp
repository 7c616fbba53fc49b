// Autograd of the pointwise losses. The only file that knows both directions.
//
// The first derivatives are the backward operator's. What it returns is differentiable too: where
// that is asked for it is computed by formulas of differentiable operators instead, which is slower
// and takes temporary tensors, but leaves every further derivative to torch. Tangents of forward
// mode take the same formulas.
#include "core/autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <array>
#include <string>

#include "core/on.h"
#include "pointwise_losses/operators.h"
#include "superquantile/operators.h"

namespace sqloss::pointwise_losses {
namespace {

using core::OptionalTensor;
using torch::autograd::variable_list;

// The losses of a call.
struct Call {
  std::string loss;
  at::Tensor input, target;
  OptionalTensor weight, other;
  double parameter;
  bool full;
  int64_t sample_dims;
  bool mean;

  at::Tensor losses() const {
    static const auto op = core::find_operator<core::Operator<decltype(pointwise_losses::forward)>>(
        "sqloss::pointwise_losses");
    return op.call(loss, input, target, weight, other, parameter, full, sample_dims, mean);
  }

  InputGradients gradients(const at::Tensor& grad_losses, std::array<bool, 3> output_mask) const {
    static const auto op =
        core::find_operator<core::Operator<decltype(pointwise_losses::backward)>>(
            "sqloss::pointwise_losses_backward");
    return op.call(grad_losses, loss, input, target, weight, other, parameter, full, sample_dims,
                   mean, output_mask);
  }

  void refuse_gradients() const {
    core::refuse_gradient("pointwise_losses", "weight", weight);
    if (loss_named(loss) == Loss::kBinaryCrossEntropyWithLogits) {
      core::refuse_gradient("pointwise_losses", "pos_weight", other);
    }
  }

  // input, target and other without tangents.
  Call primals() const {
    Call call = *this;
    call.input = core::primal(input);
    call.target = core::primal(target);
    if (other) call.other = core::primal(*other);
    return call;
  }

  // Of a sample's loss in the elements of input, target and other; formulas as in cpu.cpp.
  std::array<at::Tensor, 3> derivatives() const {
    const at::Tensor x = computed(input), y = computed(target);
    std::array<at::Tensor, 3> result;
    auto& [in_x, in_y, in_other] = result;
    switch (loss_named(loss)) {
      case Loss::kBinaryCrossEntropyWithLogits: {
        const at::Tensor pos_weight = other ? computed(*other) : at::ones_like(x);
        in_x = (1 - y) * at::sigmoid(x) - pos_weight * y * at::sigmoid(-x);
        in_y = at::log_sigmoid(-x) - pos_weight * at::log_sigmoid(x);
        break;
      }
      case Loss::kMse:
        in_x = 2 * (x - y);
        in_y = -in_x;
        break;
      case Loss::kSmoothL1: {
        const at::Tensor difference = x - y;
        // torch's sign of NaN is 0
        in_x = at::where(difference.isnan(), difference, difference.sign());
        if (parameter > 0) {
          // Elsewhere 0, because 0 times an infinite 1 / beta would be the derivative there
          const at::Tensor near = difference.abs() < parameter;
          in_x = at::where(near, difference.masked_fill(~near, 0) / parameter, in_x);
        }
        in_y = -in_x;
        break;
      }
      case Loss::kHuber:
        in_x = at::clamp(x - y, -parameter, parameter);
        in_y = -in_x;
        break;
      case Loss::kGaussianNll: {
        const at::Tensor var = computed(*other);
        // max(var, eps), but with the derivative 1 everywhere
        const at::Tensor v = at::where(var < parameter, var - var.detach() + parameter, var);
        in_x = (x - y) / v;
        in_y = -in_x;
        in_other = 0.5 * (1 - in_x * (x - y)) / v;
        break;
      }
    }
    c10::SymInt elements = 1;
    for (int64_t d = sample_dims; d < input.dim(); ++d) elements *= input.sym_size(d);
    for (at::Tensor& derivative : result) {
      if (!derivative.defined()) continue;
      if (weight) derivative = derivative * computed(*weight);
      if (mean) derivative = derivative / at::Scalar(elements);
    }
    return result;
  }

  // How the losses move with input, target and other: the adjoint of their gradients.
  at::Tensor losses_tangent() const {
    const std::array<OptionalTensor, 3> tangents{core::tangent(input), core::tangent(target),
                                                 core::tangent(other)};
    const auto in = primals().derivatives();
    at::Tensor sum;
    for (size_t i = 0; i < in.size(); ++i) {
      if (!tangents[i]) continue;
      const at::Tensor moved = in[i] * tangents[i]->to(dtype());
      sum = sum.defined() ? sum + moved : moved;
    }
    at::DimVector elements;
    for (int64_t d = sample_dims; d < input.dim(); ++d) elements.push_back(d);
    return elements.empty() ? sum : sum.sum(elements);
  }

  // The gradients, differentiable in grad_losses, input, target and other.
  InputGradients differentiable_gradients(const at::Tensor& grad_losses,
                                          std::array<bool, 3> output_mask) const {
    at::Tensor grad = grad_losses;
    for (int64_t d = sample_dims; d < input.dim(); ++d) grad = grad.unsqueeze(-1);
    const auto in = derivatives();
    const auto gradient = [&](size_t i, const OptionalTensor& of) {
      if (!output_mask[i]) return at::empty({0}, input.options());
      // Only a derivative that is not finite is masked: the gradient moves with that of a loss
      // also from 0.
      const at::Tensor masked = (grad == 0).logical_and(in[i].isfinite().logical_not());
      return (grad * in[i].masked_fill(masked, 0)).to(of->scalar_type());
    };
    return {gradient(0, input), gradient(1, target), gradient(2, other)};
  }

 private:
  at::ScalarType dtype() const {
    const auto is_double = [](const OptionalTensor& tensor) {
      return tensor && tensor->scalar_type() == at::kDouble;
    };
    return is_double(input) || is_double(target) || is_double(weight) || is_double(other)
               ? at::kDouble
               : at::kFloat;
  }
  at::Tensor computed(const at::Tensor& tensor) const { return tensor.to(dtype()); }
};

// A node that saves a call, and maybe more tensors after those of the call.
class CallNode : public core::SavingNode {
 public:
  void save(const Call& call) {
    SavingNode::save({call.input, call.target, call.weight, call.other});
    call_ = call;
    call_.input = call_.target = at::Tensor();  // saved, and freed with what is
    call_.weight = call_.other = std::nullopt;
  }

 protected:
  // The gradients of input, target and other, the node's outputs from `first` on, into these.
  void add_gradients(const variable_list& saved, const at::Tensor& grad_losses, size_t first,
                     variable_list& gradients) {
    std::array<bool, 3> wanted{};
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(first + i);
    if (!(wanted[0] || wanted[1] || wanted[2])) return;
    Call call = call_;
    call.input = saved[0];
    call.target = saved[1];
    call.weight = core::optional(saved[2]);
    call.other = core::optional(saved[3]);
    const auto [input, target, other] = call.gradients(grad_losses, wanted);
    if (wanted[0]) gradients[first] = input;
    if (wanted[1]) gradients[first + 1] = target;
    if (wanted[2]) gradients[first + 2] = other;
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(call_.loss);
    args.collect(call_.parameter);
    args.collect(call_.full);
    args.collect(call_.sample_dims);
    args.collect(call_.mean);
  }

 private:
  Call call_;
};

struct PointwiseLossesBackward final : CallNode {
  variable_list apply(variable_list&& grads) override {
    variable_list gradients(3);
    if (grads[0].defined()) add_gradients(unpack(), grads[0], 0, gradients);
    return gradients;
  }
  std::string name() const override { return "PointwiseLossesBackward"; }
};

// From the gradient of the tail's value to those of extra, input, target and other.
struct PointwiseLossesCvarBackward final : CallNode {
  void save(const Call& call, const at::Tensor& losses, const at::Tensor& threshold,
            const at::Tensor& counts) {
    CallNode::save(call);
    SavingNode::save({losses, threshold, counts});
  }

  variable_list apply(variable_list&& grads) override {
    variable_list gradients(4);
    if (!grads[0].defined()) return gradients;
    static const auto op = core::find_operator<core::Operator<decltype(superquantile::backward)>>(
        "sqloss::superquantile_backward");
    const auto saved = unpack();
    const at::Tensor grad_losses =
        op.call(grads[0], {}, saved[4], {}, {}, saved[5], saved[6], {}, false);
    if (task_should_compute_output(0)) gradients[0] = grad_losses;
    add_gradients(saved, grad_losses, 1, gradients);
    return gradients;
  }
  std::string name() const override { return "PointwiseLossesCvarBackward"; }
};

at::Tensor forward_autograd(std::string_view loss, const at::Tensor& input,
                            const at::Tensor& target, const OptionalTensor& weight,
                            const OptionalTensor& other, double parameter, bool full,
                            int64_t sample_dims, bool mean) {
  const Call call{std::string(loss), input, target,      weight, other,
                  parameter,         full,  sample_dims, mean};
  call.refuse_gradients();
  const at::Tensor losses = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call.losses();
  }();
  if (torch::autograd::isFwGradDefined(input) || torch::autograd::isFwGradDefined(target) ||
      torch::autograd::isFwGradDefined(other)) {
    core::set_tangent(losses, call.losses_tangent());
  }
  if (torch::autograd::compute_requires_grad(input, target, other)) {
    const auto node = core::make_node<PointwiseLossesBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, target, other));
    node->save(call);
    torch::autograd::set_history(losses, node);
  }
  return losses;
}

CvarOutputs forward_cvar_autograd(const at::Tensor& tail_fraction, const OptionalTensor& extra,
                                  std::string_view loss, const at::Tensor& input,
                                  const at::Tensor& target, const OptionalTensor& weight,
                                  const OptionalTensor& other, double parameter, bool full,
                                  int64_t sample_dims, bool mean) {
  const Call call{std::string(loss), input, target,      weight, other,
                  parameter,         full,  sample_dims, mean};
  call.refuse_gradients();
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(extra) && !torch::autograd::isFwGradDefined(input) &&
          !torch::autograd::isFwGradDefined(target) && !torch::autograd::isFwGradDefined(other),
      "pointwise_losses_cvar: expected tensors without tangents (forward-mode derivatives are "
      "those "
      "of pointwise_losses and superquantile)");
  CvarOutputs outputs = [&] {
    static const auto op = core::find_operator<core::Operator<decltype(forward_cvar)>>(
        "sqloss::pointwise_losses_cvar");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(tail_fraction, extra, loss, input, target, weight, other, parameter, full,
                   sample_dims, mean);
  }();
  if (torch::autograd::compute_requires_grad(extra, input, target, other)) {
    const auto& [value, losses, threshold, counts] = outputs;
    const auto node = core::make_node<PointwiseLossesCvarBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(extra, input, target, other));
    node->save(call, losses, threshold, counts);
    torch::autograd::set_history(value, node);
  }
  return outputs;
}

InputGradients backward_autograd(const at::Tensor& grad_losses, std::string_view loss,
                                 const at::Tensor& input, const at::Tensor& target,
                                 const OptionalTensor& weight, const OptionalTensor& other,
                                 double parameter, bool full, int64_t sample_dims, bool mean,
                                 std::array<bool, 3> output_mask) {
  const Call call{std::string(loss), input, target,      weight, other,
                  parameter,         full,  sample_dims, mean};
  call.refuse_gradients();
  if (torch::autograd::compute_requires_grad(grad_losses, input, target, other) ||
      torch::autograd::isFwGradDefined(grad_losses) || torch::autograd::isFwGradDefined(input) ||
      torch::autograd::isFwGradDefined(target) || torch::autograd::isFwGradDefined(other)) {
    return call.differentiable_gradients(grad_losses, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call.gradients(grad_losses, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(sqloss, Autograd, m) {
  m.impl("pointwise_losses", forward_autograd);
  m.impl("pointwise_losses_backward", backward_autograd);
  m.impl("pointwise_losses_cvar", forward_cvar_autograd);
}

}  // namespace sqloss::pointwise_losses
