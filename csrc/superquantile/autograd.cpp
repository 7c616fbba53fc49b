// Autograd and autocast of the superquantile operators. The only file that knows both directions.
//
// Written as torch's own generated derivatives are, a Node for reverse mode and tangents for
// forward mode, and not as a torch::autograd::Function: that one torch.func transforms refuse.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <type_traits>

#include "superquantile/superquantile.h"

namespace sqloss::superquantile {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::Edge;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

Outputs call_forward(const at::Tensor& losses, const at::Tensor& tail_fraction,
                     const OptionalTensor& weight, const OptionalTensor& mask, at::IntArrayRef dim,
                     bool keepdim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sqloss::superquantile", "")
                             .typed<decltype(forward_cpu)>();
  return op.call(losses, tail_fraction, weight, mask, dim, keepdim);
}

at::Tensor call_backward(const OptionalTensor& grad_value, const OptionalTensor& grad_threshold,
                         const at::Tensor& losses, const OptionalTensor& weight,
                         const OptionalTensor& mask, const at::Tensor& threshold,
                         const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sqloss::superquantile_backward", "")
                             .typed<decltype(backward_cpu)>();
  return op.call(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim, keepdim);
}

OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
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
class TailNode : public torch::autograd::Node {
 public:
  void save(const TailPosition& tail) {
    losses_ = SavedVariable(tail.losses, /*is_output=*/false);
    weight_ = SavedVariable(tail.weight, /*is_output=*/false);
    mask_ = SavedVariable(tail.mask, /*is_output=*/false);
    // A detached alias, because the output itself owns this node: neither would ever be freed.
    threshold_ = SavedVariable(tail.threshold.detach(), /*is_output=*/false);
    counts_ = SavedVariable(tail.counts, /*is_output=*/false);
    dim_ = tail.dim;
    keepdim_ = tail.keepdim;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : all_saved()) saved->reset_data();
  }

  // Compiled autograd: what the node depends on, and its call on traced stand-ins for it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* saved : const_cast<TailNode*>(this)->all_saved()) {
      args.collect(*saved, /*is_output=*/false);
    }
    for (const int64_t d : dim_) args.collect(d);
    args.collect(keepdim_);
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable* saved : all_saved()) swap.before(*saved);
    variable_list gradients = apply(variable_list(grads));
    for (SavedVariable* saved : all_saved()) swap.after(*saved);
    return gradients;
  }

 protected:
  TailPosition unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {losses_.unpack(),
            optional(weight_.unpack()),
            optional(mask_.unpack()),
            threshold_.unpack(),
            counts_.unpack(),
            dim_,
            keepdim_};
  }

 private:
  std::array<SavedVariable*, 5> all_saved() {
    return {&losses_, &weight_, &mask_, &threshold_, &counts_};
  }

  SavedVariable losses_, weight_, mask_, threshold_, counts_;
  std::vector<int64_t> dim_;
  bool keepdim_ = false;
};

// Gradients of value and threshold to that of the losses.
struct SuperquantileBackward final : TailNode {
  variable_list apply(variable_list&& grads) override {
    const bool wanted = task_should_compute_output(0) && (grads[0].defined() || grads[1].defined());
    return {wanted ? unpack().gradient(optional(grads[0]), optional(grads[1])) : at::Tensor()};
  }
  std::string name() const override { return "SuperquantileBackward"; }
};

// The backward operator is linear in the two gradients it takes and constant in the losses.
struct SuperquantileBackwardBackward final : TailNode {
  variable_list apply(variable_list&& grads) override {
    variable_list gradients(2);
    if (!grads[0].defined()) return gradients;
    const TailPosition tail = unpack();
    if (task_should_compute_output(0)) gradients[0] = tail.value_tangent(grads[0]);
    if (task_should_compute_output(1)) gradients[1] = tail.threshold_tangent(grads[0]);
    return gradients;
  }
  std::string name() const override { return "SuperquantileBackwardBackward"; }
};

// In the pointer by which this version of torch holds nodes.
template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<decltype(Edge::function), std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

void refuse_gradient(const char* name, const OptionalTensor& tensor) {
  TORCH_CHECK_VALUE(
      !torch::autograd::compute_requires_grad(tensor) && !torch::autograd::isFwGradDefined(tensor),
      "superquantile: ", name,
      ": expected a tensor without gradient (the derivative in it is not "
      "implemented), got one that requires it");
}

Outputs forward_autograd(const at::Tensor& losses, const at::Tensor& tail_fraction,
                         const OptionalTensor& weight, const OptionalTensor& mask,
                         at::IntArrayRef dim, bool keepdim) {
  refuse_gradient("tail_fraction", tail_fraction);
  refuse_gradient("weight", weight);
  const bool reverse = torch::autograd::compute_requires_grad(losses);
  const bool forward = torch::autograd::isFwGradDefined(losses);
  Outputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(losses, tail_fraction, weight, mask, dim, keepdim);
  }();
  if (!reverse && !forward) return outputs;

  const auto& [value, threshold, counts] = outputs;
  const TailPosition tail{losses, weight, mask, threshold, counts, dim.vec(), keepdim};
  if (forward) {
    const at::Tensor tangent = losses._fw_grad(/*level=*/0);
    const at::Tensor value_tangent = tail.value_tangent(tangent);
    const at::Tensor threshold_tangent = tail.threshold_tangent(tangent);
    value._set_fw_grad(value_tangent, /*level=*/0, /*is_inplace_op=*/false);
    threshold._set_fw_grad(threshold_tangent, /*level=*/0, /*is_inplace_op=*/false);
  }
  if (reverse) {
    const auto node = make_node<SuperquantileBackward>();
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
  const auto tangent = [](const OptionalTensor& grad) {
    return torch::autograd::isFwGradDefined(grad) ? OptionalTensor(grad->_fw_grad(/*level=*/0))
                                                  : std::nullopt;
  };
  const OptionalTensor value_tangent = tangent(grad_value);
  const OptionalTensor threshold_tangent = tangent(grad_threshold);
  const at::Tensor grad_losses = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim,
                         keepdim);
  }();
  if (!reverse && !value_tangent && !threshold_tangent) return grad_losses;

  const TailPosition tail{losses, weight, mask, threshold, counts, dim.vec(), keepdim};
  if (value_tangent || threshold_tangent) {
    grad_losses._set_fw_grad(tail.gradient(value_tangent, threshold_tangent), /*level=*/0,
                             /*is_inplace_op=*/false);
  }
  if (reverse) {
    const auto node = make_node<SuperquantileBackwardBackward>();
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
                         at::IntArrayRef dim, bool keepdim) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return call_forward(at::autocast::cached_cast(at::kFloat, losses, device), tail_fraction, weight,
                      mask, dim, keepdim);
}

}  // namespace

TORCH_LIBRARY_IMPL(sqloss, Autograd, m) {
  m.impl("superquantile", forward_autograd);
  m.impl("superquantile_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(sqloss, AutocastCPU, m) { m.impl("superquantile", forward_autocast<at::kCPU>); }

TORCH_LIBRARY_IMPL(sqloss, AutocastCUDA, m) {
  m.impl("superquantile", forward_autocast<at::kCUDA>);
}

}  // namespace sqloss::superquantile
