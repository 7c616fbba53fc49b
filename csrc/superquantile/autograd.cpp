// Autograd and autocast of the superquantile operators. The only file that knows both directions.
#include "core/autograd.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include "core/on.h"
#include "superquantile/distributed.h"
#include "superquantile/operators.h"

namespace sqloss::superquantile {
namespace {

using core::OptionalTensor;
using torch::autograd::variable_list;

Outputs call_forward(const at::Tensor& losses, const at::Tensor& tail_fraction,
                     const OptionalTensor& weight, const OptionalTensor& mask, at::IntArrayRef dim,
                     bool keepdim, std::string_view function, std::string_view none_counts) {
  static const auto op =
      core::find_operator<core::Operator<decltype(forward)>>("sqloss::superquantile");
  return op.call(losses, tail_fraction, weight, mask, dim, keepdim, function, none_counts);
}

at::Tensor call_backward(const OptionalTensor& grad_value, const OptionalTensor& grad_threshold,
                         const at::Tensor& losses, const OptionalTensor& weight,
                         const OptionalTensor& mask, const at::Tensor& threshold,
                         const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
  static const auto op =
      core::find_operator<core::Operator<decltype(backward)>>("sqloss::superquantile_backward");
  return op.call(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim, keepdim);
}

// Where the tail of a reduction lies, which gives both of its derivatives.
struct TailPosition {
  at::Tensor losses;
  OptionalTensor weight, mask;
  at::Tensor threshold, counts;
  std::vector<int64_t> dim;
  bool keepdim;

  // Of the losses, from those of value and threshold.
  at::Tensor gradient(const OptionalTensor& grad_value,
                      const OptionalTensor& grad_threshold) const {
    return call_backward(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim,
                         keepdim);
  }

  // How value and threshold move with the losses: the adjoint of the gradient.
  at::Tensor value_tangent(const at::Tensor& tangent) const {
    return (gradient(at::ones_like(threshold), {}) * tangent).sum(dim, keepdim);
  }
  at::Tensor threshold_tangent(const at::Tensor& tangent) const {
    return (gradient({}, at::ones_like(threshold)) * tangent).sum(dim, keepdim);
  }
};

// A node of the graph that saves a TailPosition.
class TailNode : public core::SavingNode {
 public:
  void save(const TailPosition& tail) {
    SavingNode::save({tail.losses, tail.weight, tail.mask, tail.threshold.detach(), tail.counts});
    dim_ = tail.dim;
    keepdim_ = tail.keepdim;
  }

 protected:
  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const int64_t d : dim_) args.collect(d);
    args.collect(keepdim_);
  }

  TailPosition tail() {
    const auto saved = unpack();
    return {saved[0], core::optional(saved[1]), core::optional(saved[2]), saved[3], saved[4], dim_,
            keepdim_};
  }

 private:
  std::vector<int64_t> dim_;
  bool keepdim_ = false;
};

// Gradients of value and threshold to that of the losses.
struct SuperquantileBackward final : TailNode {
  variable_list apply(variable_list&& grads) override {
    const bool wanted = task_should_compute_output(0) && (grads[0].defined() || grads[1].defined());
    return {wanted ? tail().gradient(core::optional(grads[0]), core::optional(grads[1]))
                   : at::Tensor()};
  }
  std::string name() const override { return "SuperquantileBackward"; }
};

// The gradient of the value of all ranks to that of this one's losses.
struct DistributedSuperquantileBackward final : TailNode {
  variable_list apply(variable_list&& grads) override {
    const bool wanted = task_should_compute_output(0) && grads[0].defined();
    return {wanted ? tail().gradient(grads[0], {}) : at::Tensor()};
  }
  std::string name() const override { return "DistributedSuperquantileBackward"; }
};

// The backward operator is linear in the two gradients it takes and constant in the losses.
struct SuperquantileBackwardBackward final : TailNode {
  variable_list apply(variable_list&& grads) override {
    variable_list gradients(2);
    if (!grads[0].defined()) return gradients;
    const TailPosition position = tail();
    if (task_should_compute_output(0)) gradients[0] = position.value_tangent(grads[0]);
    if (task_should_compute_output(1)) gradients[1] = position.threshold_tangent(grads[0]);
    return gradients;
  }
  std::string name() const override { return "SuperquantileBackwardBackward"; }
};

Outputs forward_autograd(const at::Tensor& losses, const at::Tensor& tail_fraction,
                         const OptionalTensor& weight, const OptionalTensor& mask,
                         at::IntArrayRef dim, bool keepdim, std::string_view function,
                         std::string_view none_counts) {
  core::refuse_gradient(function, "tail_fraction", tail_fraction);
  core::refuse_gradient(function, "weight", weight);
  const bool reverse = torch::autograd::compute_requires_grad(losses);
  const OptionalTensor tangent = core::tangent(losses);
  Outputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(losses, tail_fraction, weight, mask, dim, keepdim, function, none_counts);
  }();
  if (!reverse && !tangent) return outputs;

  const auto& [value, threshold, counts] = outputs;
  const TailPosition tail{losses, weight, mask, threshold, counts, dim.vec(), keepdim};
  if (tangent) {
    core::set_tangent(value, tail.value_tangent(*tangent));
    core::set_tangent(threshold, tail.threshold_tangent(*tangent));
  }
  if (reverse) {
    const auto node = core::make_node<SuperquantileBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(losses));
    node->save(tail);
    torch::autograd::set_history(value, node);
    torch::autograd::set_history(threshold, node);
  }
  return outputs;
}

at::Tensor backward_autograd(const OptionalTensor& grad_value, const OptionalTensor& grad_threshold,
                             const at::Tensor& losses, const OptionalTensor& weight,
                             const OptionalTensor& mask, const at::Tensor& threshold,
                             const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
  const bool reverse = torch::autograd::compute_requires_grad(grad_value, grad_threshold);
  const OptionalTensor value_tangent = core::tangent(grad_value);
  const OptionalTensor threshold_tangent = core::tangent(grad_threshold);
  const at::Tensor grad_losses = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim,
                         keepdim);
  }();
  if (!reverse && !value_tangent && !threshold_tangent) return grad_losses;

  const TailPosition tail{losses, weight, mask, threshold, counts, dim.vec(), keepdim};
  if (value_tangent || threshold_tangent) {
    core::set_tangent(grad_losses, tail.gradient(value_tangent, threshold_tangent));
  }
  if (reverse) {
    const auto node = core::make_node<SuperquantileBackwardBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad_value, grad_threshold));
    node->save(tail);
    torch::autograd::set_history(grad_losses, node);
  }
  return grad_losses;
}

// Under autocast losses are reduced in float32, as torch's own losses are.
template <at::DeviceType device>
Outputs forward_autocast(const at::Tensor& losses, const at::Tensor& tail_fraction,
                         const OptionalTensor& weight, const OptionalTensor& mask,
                         at::IntArrayRef dim, bool keepdim, std::string_view function,
                         std::string_view none_counts) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return call_forward(at::autocast::cached_cast(at::kFloat, losses, device), tail_fraction, weight,
                      mask, dim, keepdim, function, none_counts);
}

}  // namespace

at::Tensor distributed_with_gradient(const at::Tensor& value, const at::Tensor& losses,
                                     const OptionalTensor& weight, const OptionalTensor& mask,
                                     const at::Tensor& threshold, const at::Tensor& counts) {
  TORCH_CHECK_NOT_IMPLEMENTED(!core::tangent(losses),
                              "distributed.cvar: losses: expected no tangent (forward "
                              "mode is not implemented), got one");
  if (!torch::autograd::compute_requires_grad(losses)) return value;
  const auto node = core::make_node<DistributedSuperquantileBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(losses));
  node->save({losses, weight, mask, threshold, counts, {}, false});
  torch::autograd::set_history(value, node);
  return value;
}

TORCH_LIBRARY_IMPL(sqloss, Autograd, m) {
  m.impl("superquantile", forward_autograd);
  m.impl("superquantile_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(sqloss, AutocastCPU, m) { m.impl("superquantile", forward_autocast<at::kCPU>); }

TORCH_LIBRARY_IMPL(sqloss, AutocastCUDA, m) {
  m.impl("superquantile", forward_autocast<at::kCUDA>);
}

}  // namespace sqloss::superquantile
