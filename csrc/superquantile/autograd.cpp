// Autograd and autocast of the superquantile operators. The only file that knows both directions.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "superquantile/superquantile.h"

namespace sqloss::superquantile {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch::autograd::AutogradContext;
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
  // Without a second derivative in sight autograd has nothing to record.
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
  if (!at::GradMode::is_enabled()) below.emplace();
  return op.call(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim, keepdim);
}

OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// What both directions save: the losses, what ranks and weighs them, and where the tail begins.
struct Saved {
  at::Tensor losses, weight, mask, threshold, counts;
  std::vector<int64_t> dim;
  bool keepdim = false;

  static void save(AutogradContext* ctx, const at::Tensor& losses, const OptionalTensor& weight,
                   const OptionalTensor& mask, const at::Tensor& threshold,
                   const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
    ctx->save_for_backward(
        {losses, weight.value_or(at::Tensor()), mask.value_or(at::Tensor()), threshold, counts});
    if (!dim.empty() || keepdim) {  // usually neither, and an entry costs a part of a microsecond
      ctx->saved_data["dim"] = dim;
      ctx->saved_data["keepdim"] = keepdim;
    }
    ctx->set_materialize_grads(false);
  }

  explicit Saved(AutogradContext* ctx) {
    if (ctx->saved_data.find("dim") != ctx->saved_data.end()) {
      dim = ctx->saved_data["dim"].toIntVector();
      keepdim = ctx->saved_data["keepdim"].toBool();
    }
    const auto saved = ctx->get_saved_variables();
    losses = saved[0], weight = saved[1], mask = saved[2], threshold = saved[3], counts = saved[4];
  }

  at::Tensor gradient(const at::Tensor& grad_value, const at::Tensor& grad_threshold) const {
    return call_backward(optional(grad_value), optional(grad_threshold), losses, optional(weight),
                         optional(mask), threshold, counts, dim, keepdim);
  }
};

// Returns value and threshold; counts, which carry no gradient, come out through the last argument.
class Superquantile : public torch::autograd::Function<Superquantile> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& losses,
                               const at::Tensor& tail_fraction, const OptionalTensor& weight,
                               const OptionalTensor& mask, at::IntArrayRef dim, bool keepdim,
                               at::Tensor* counts_out) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, threshold, counts] =
        call_forward(losses, tail_fraction, weight, mask, dim, keepdim);
    Saved::save(ctx, losses, weight, mask, threshold, counts, dim, keepdim);
    *counts_out = counts;
    return {value, threshold};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(7);
    if (grads[0].defined() || grads[1].defined()) {
      gradients[0] = Saved(ctx).gradient(grads[0], grads[1]);
    }
    return gradients;
  }
};

// The backward operator is linear in the two gradients it takes and constant in the losses.
class SuperquantileBackward : public torch::autograd::Function<SuperquantileBackward> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const OptionalTensor& grad_value,
                            const OptionalTensor& grad_threshold, const at::Tensor& losses,
                            const OptionalTensor& weight, const OptionalTensor& mask,
                            const at::Tensor& threshold, const at::Tensor& counts,
                            at::IntArrayRef dim, bool keepdim) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Saved::save(ctx, losses, weight, mask, threshold, counts, dim, keepdim);
    ctx->saved_data["has_value"] = grad_value.has_value();
    ctx->saved_data["has_threshold"] = grad_threshold.has_value();
    return call_backward(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim,
                         keepdim);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list gradients(9);
    if (!grads[0].defined()) return gradients;
    const Saved saved(ctx);
    const at::Tensor ones = at::ones_like(saved.threshold);
    const auto adjoint = [&](const at::Tensor& of_value, const at::Tensor& of_threshold) {
      return (saved.gradient(of_value, of_threshold) * grads[0]).sum(saved.dim, saved.keepdim);
    };
    // autograd numbers the inputs that are there
    const bool has_value = ctx->saved_data["has_value"].toBool();
    const bool has_threshold = ctx->saved_data["has_threshold"].toBool();
    if (has_value && ctx->needs_input_grad(0)) gradients[0] = adjoint(ones, {});
    if (has_threshold && ctx->needs_input_grad(has_value)) gradients[1] = adjoint({}, ones);
    return gradients;
  }
};

Outputs forward_autograd(const at::Tensor& losses, const at::Tensor& tail_fraction,
                         const OptionalTensor& weight, const OptionalTensor& mask,
                         at::IntArrayRef dim, bool keepdim) {
  if (!at::GradMode::is_enabled() || !losses.requires_grad()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(losses, tail_fraction, weight, mask, dim, keepdim);
  }
  at::Tensor counts;
  const auto outputs =
      Superquantile::apply(losses, tail_fraction, weight, mask, dim, keepdim, &counts);
  return {outputs[0], outputs[1], counts};
}

at::Tensor backward_autograd(const OptionalTensor& grad_value, const OptionalTensor& grad_threshold,
                             const at::Tensor& losses, const OptionalTensor& weight,
                             const OptionalTensor& mask, const at::Tensor& threshold,
                             const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
  if (!at::GradMode::is_enabled()) {
    return call_backward(grad_value, grad_threshold, losses, weight, mask, threshold, counts, dim,
                         keepdim);
  }
  return SuperquantileBackward::apply(grad_value, grad_threshold, losses, weight, mask, threshold,
                                      counts, dim, keepdim);
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
