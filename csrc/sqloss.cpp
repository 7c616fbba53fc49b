// The front door: every operator's schema, its kernels by device, and its pybind11 binding.
// Autograd, and autocast where it matters, are registered by each operation's autograd.cpp; fake
// tensors, vmap and the reference for other devices in sqloss/_ops/.
#include <ATen/ScalarOps.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/functional.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "core/cpu_capability.h"
#include "core/find_operator.h"
#include "core/on.h"
#include "cross_entropy_losses/operators.h"
#include "pointwise_losses/operators.h"
#include "student_t/operators.h"
#include "superquantile/distributed.h"
#include "superquantile/fused_tail.h"
#include "superquantile/operators.h"

namespace sqloss {
namespace {

TORCH_LIBRARY(sqloss, m) {
  m.set_python_module("sqloss._ops.superquantile");
  const std::string superquantile_schema =
      "superquantile(Tensor losses, Tensor tail_fraction, Tensor? weight, Tensor? mask, int[] dim, "
      "bool keepdim, str function=\"superquantile\", str none_counts=\"" +
      std::string(superquantile::kNoneCounts) +
      "\") -> (Tensor value, Tensor threshold, Tensor counts)";
  m.def(superquantile_schema.c_str(), {at::Tag::pt2_compliant_tag});
  m.def(
      "superquantile_backward(Tensor? grad_value, Tensor? grad_threshold, Tensor losses, "
      "Tensor? weight, Tensor? mask, Tensor threshold, Tensor counts, int[] dim, bool keepdim) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_FRAGMENT(sqloss, m) {
  m.set_python_module("sqloss._ops.losses");
  m.def(
      "pointwise_losses(str loss, Tensor input, Tensor target, Tensor? weight, Tensor? other, "
      "float parameter, bool full, int sample_dims, bool mean) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "pointwise_losses_backward(Tensor grad_losses, str loss, Tensor input, Tensor target, "
      "Tensor? weight, Tensor? other, float parameter, bool full, int sample_dims, bool mean, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_target, Tensor grad_other)",
      {at::Tag::pt2_compliant_tag});
  // Of few losses in eager mode; has neither fake tensors nor vmap
  m.def(
      "pointwise_losses_cvar(Tensor tail_fraction, Tensor? extra, str loss, Tensor input, "
      "Tensor target, Tensor? weight, Tensor? other, float parameter, bool full, int sample_dims, "
      "bool mean) -> (Tensor value, Tensor losses, Tensor threshold, Tensor counts)");
  m.def(
      "cross_entropy_losses(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, str function=\"cross_entropy_losses\") -> "
      "(Tensor losses, Tensor log_sum_exp)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "cross_entropy_losses_backward(Tensor grad_losses, Tensor input, Tensor target, "
      "Tensor? weight, Tensor log_sum_exp, int ignore_index, float label_smoothing, "
      "bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)",
      {at::Tag::pt2_compliant_tag});
  // As pointwise_losses_cvar
  m.def(
      "cross_entropy_losses_cvar(Tensor tail_fraction, Tensor? extra, Tensor input, Tensor target, "
      "Tensor? weight, int ignore_index, float label_smoothing) -> (Tensor value, Tensor losses, "
      "Tensor log_sum_exp, Tensor threshold, Tensor counts)");
}

TORCH_LIBRARY_FRAGMENT(sqloss, m) {
  m.set_python_module("sqloss._ops.student_t");
  m.def(
      "student_t_rsample_kl(Tensor? df, Tensor loc, Tensor scale, Tensor? prior_df, Tensor seed, "
      "Tensor? rows, int? num_samples, str parameterization, str kl, bool kl_mean, bool return_z) "
      "-> (Tensor z, Tensor kl)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "student_t_rsample_kl_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? df, Tensor loc, "
      "Tensor scale, Tensor? prior_df, Tensor seed, Tensor? rows, int? num_samples, "
      "str parameterization, str kl, bool kl_mean, bool[4] output_mask) "
      "-> (Tensor grad_df, Tensor grad_loc, Tensor grad_scale, Tensor grad_prior_df)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "student_t_noise(Tensor loc, Tensor seed, Tensor? rows, int? num_samples) "
      "-> (Tensor energy, Tensor cosine)",
      {at::Tag::pt2_compliant_tag});
  m.def("draw_seed(Generator? generator, *, Device device) -> Tensor",
        {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
}

TORCH_LIBRARY_IMPL(sqloss, CPU, m) {
  m.impl("superquantile", core::On<superquantile::forward, superquantile::cpu_kernels>::call);
  m.impl("superquantile_backward",
         core::On<superquantile::backward, superquantile::cpu_kernels>::call);
  m.impl("pointwise_losses",
         core::On<pointwise_losses::forward, pointwise_losses::cpu_kernels>::call);
  m.impl("pointwise_losses_backward",
         core::On<pointwise_losses::backward, pointwise_losses::cpu_kernels>::call);
  m.impl("cross_entropy_losses",
         core::On<cross_entropy_losses::forward, cross_entropy_losses::cpu_kernels>::call);
  m.impl("cross_entropy_losses_backward",
         core::On<cross_entropy_losses::backward, cross_entropy_losses::cpu_kernels>::call);
  m.impl("student_t_rsample_kl", core::On<student_t::forward, student_t::cpu_kernels>::call);
  m.impl("student_t_rsample_kl_backward",
         core::On<student_t::backward, student_t::cpu_kernels>::call);
  m.impl("student_t_noise", core::On<student_t::noise, student_t::cpu_kernels>::call);
}

TORCH_LIBRARY_IMPL(sqloss, CompositeExplicitAutograd, m) {
  m.impl("draw_seed", student_t::draw_seed);
}

// Under vmap: torch's own random operator, which knows whether each of its batch is to have a seed.
TORCH_LIBRARY_IMPL(sqloss, FuncTorchVmapMode, m) {
  m.impl("draw_seed", student_t::draw_seed_by_torch);
}

#ifdef SQLOSS_WITH_CUDA
TORCH_LIBRARY_IMPL(sqloss, CUDA, m) {
  m.impl("superquantile", core::On<superquantile::forward, superquantile::cuda_kernels>::call);
  m.impl("superquantile_backward",
         core::On<superquantile::backward, superquantile::cuda_kernels>::call);
  m.impl("pointwise_losses",
         core::On<pointwise_losses::forward, pointwise_losses::cuda_kernels>::call);
  m.impl("pointwise_losses_backward",
         core::On<pointwise_losses::backward, pointwise_losses::cuda_kernels>::call);
  m.impl("pointwise_losses_cvar",
         core::On<pointwise_losses::forward_cvar, pointwise_losses::cuda_kernels>::call);
  m.impl("cross_entropy_losses",
         core::On<cross_entropy_losses::forward, cross_entropy_losses::cuda_kernels>::call);
  m.impl("cross_entropy_losses_backward",
         core::On<cross_entropy_losses::backward, cross_entropy_losses::cuda_kernels>::call);
  m.impl("cross_entropy_losses_cvar",
         core::On<cross_entropy_losses::forward_cvar, cross_entropy_losses::cuda_kernels>::call);
  m.impl("student_t_rsample_kl", core::On<student_t::forward, student_t::cuda_kernels>::call);
  m.impl("student_t_rsample_kl_backward",
         core::On<student_t::backward, student_t::cuda_kernels>::call);
  m.impl("student_t_noise", core::On<student_t::noise, student_t::cuda_kernels>::call);
}
#endif

// A 0-dim float64 on the CPU, made without the dispatcher unless a mode (of fake tensors, say) has
// to see it.
at::Tensor scalar(double number) {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ? at::scalar_tensor(number, at::kDouble)
                                                          : c10::scalar_to_tensor(number);
}

// Eager calls: through the dispatcher, past the slower parsing of torch.ops, and returning one
// output, because every tensor that reaches Python costs as much as the selection from 128 losses.
template <size_t output>
at::Tensor superquantile_of(const at::Tensor& losses, double tail_fraction,
                            const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& mask, at::IntArrayRef dim,
                            bool keepdim, const superquantile::Caller& caller) {
  static const auto op = core::find_operator<core::Operator<decltype(superquantile::forward)>>(
      "sqloss::superquantile");
  return std::get<output>(op.call(losses, scalar(tail_fraction), weight, mask, dim, keepdim,
                                  caller.function, caller.none_counts));
}

template <size_t output>
at::Tensor superquantile_eager(const at::Tensor& losses, double tail_fraction,
                               const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& mask,
                               const std::vector<int64_t>& dim, bool keepdim,
                               std::string_view function) {
  return superquantile_of<output>(losses, tail_fraction, weight, mask, dim, keepdim, {function});
}

at::Tensor pointwise_losses_eager(std::string_view loss, const at::Tensor& input,
                                  const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& other, double parameter,
                                  bool full, int64_t sample_dims, bool mean) {
  static const auto op = core::find_operator<core::Operator<decltype(pointwise_losses::forward)>>(
      "sqloss::pointwise_losses");
  return op.call(loss, input, target, weight, other, parameter, full, sample_dims, mean);
}

at::Tensor cross_entropy_losses_eager(const at::Tensor& input, const at::Tensor& target,
                                      const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                      double label_smoothing, std::string_view function) {
  static const auto op =
      core::find_operator<core::Operator<decltype(cross_entropy_losses::forward)>>(
          "sqloss::cross_entropy_losses");
  return std::get<0>(op.call(input, target, weight, ignore_index, label_smoothing, function));
}

// Whether an eager call takes the operator that finds the tail of its losses as well: it has a
// kernel for this input, and nobody traces the call or wants a derivative that the operator lacks.
// Sizes are for the caller to look at, and only then: those of traced tensors may be symbols.
bool finds_tail(const c10::OperatorHandle& op, const std::optional<at::Tensor>& extra,
                std::initializer_list<const at::Tensor*> input_and_others) {  // null if absent
  const at::Tensor& input = **input_and_others.begin();
  if (!op.hasKernelForDispatchKey(
          c10::computeDispatchKey(std::nullopt, input.layout(), input.device())) ||
      c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) {
    return false;
  }
  const auto plain = [](const at::Tensor& tensor) {
    return !tensor.key_set().has(c10::DispatchKey::Python) && !tensor._fw_grad(0).defined();
  };
  at::ScalarType dtype = at::kFloat;
  for (const at::Tensor* tensor : input_and_others) {
    if (tensor == nullptr) continue;
    if (!plain(*tensor)) return false;
    if (tensor->scalar_type() == at::kDouble) dtype = at::kDouble;
  }
  return !extra || (plain(*extra) && extra->scalar_type() == dtype);
}

bool are_few(int64_t losses) { return 1 <= losses && losses <= superquantile::kMostFusedLosses; }

const at::Tensor* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// The superquantile of all losses + extra, and these where they are wanted.
using ValueAndLosses = std::tuple<at::Tensor, std::optional<at::Tensor>>;
ValueAndLosses cvar_of(at::Tensor losses, const std::optional<at::Tensor>& extra,
                       double tail_fraction, const std::optional<at::Tensor>& mask,
                       bool return_losses, const superquantile::Caller& caller) {
  if (extra) losses = losses + *extra;
  at::Tensor value = superquantile_of<0>(losses, tail_fraction, {}, mask, {}, false, caller);
  if (!return_losses) return {std::move(value), std::nullopt};
  return {std::move(value), losses.detach()};
}

ValueAndLosses cvar_pointwise(double tail_fraction, const std::optional<at::Tensor>& extra,
                              std::string_view loss, const at::Tensor& input,
                              const at::Tensor& target, const std::optional<at::Tensor>& weight,
                              const std::optional<at::Tensor>& other, double parameter, bool full,
                              int64_t sample_dims, bool mean, bool return_losses,
                              std::string_view function) {
  static const auto op =
      core::find_operator<core::Operator<decltype(pointwise_losses::forward_cvar)>>(
          "sqloss::pointwise_losses_cvar");
  const auto losses = [&] { return c10::multiply_integers(input.sizes().slice(0, sample_dims)); };
  if (finds_tail(op, extra, {&input, &target, pointer(weight), pointer(other)}) &&
      are_few(losses()) && 0 < input.numel() &&
      input.numel() <= losses() * pointwise_losses::kMostFusedElements) {
    auto [value, all, threshold, counts] =
        op.call(scalar(tail_fraction), extra, loss, input, target, weight, other, parameter, full,
                sample_dims, mean);
    if (!return_losses) return {std::move(value), std::nullopt};
    return {std::move(value), std::move(all)};
  }
  return cvar_of(pointwise_losses_eager(loss, input, target, weight, other, parameter, full,
                                        sample_dims, mean),
                 extra, tail_fraction, {}, return_losses, {function});
}

ValueAndLosses cvar_cross_entropy(double tail_fraction, const std::optional<at::Tensor>& extra,
                                  const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                  double label_smoothing, bool return_losses,
                                  std::string_view function, std::string_view none_counts) {
  static const auto op =
      core::find_operator<core::Operator<decltype(cross_entropy_losses::forward_cvar)>>(
          "sqloss::cross_entropy_losses_cvar");
  if (finds_tail(op, extra, {&input, &target, pointer(weight)}) && input.dim() >= 2 &&
      input.size(1) > 0 && are_few(input.numel() / input.size(1))) {
    auto [value, all, log_sum_exp, threshold, counts] =
        op.call(scalar(tail_fraction), extra, input, target, weight, ignore_index, label_smoothing);
    if (!return_losses) return {std::move(value), std::nullopt};
    return {std::move(value), std::move(all)};
  }
  std::optional<at::Tensor> mask;
  if (!target.is_floating_point()) mask = target != ignore_index;
  return cvar_of(
      cross_entropy_losses_eager(input, target, weight, ignore_index, label_smoothing, function),
      extra, tail_fraction, mask, return_losses, {function, none_counts});
}

at::Tensor draw_seed_eager(const std::optional<at::Generator>& generator, at::Device device) {
  static const auto op = core::find_operator<decltype(student_t::draw_seed)>("sqloss::draw_seed");
  return op.call(generator, device);
}

// The outputs that are wanted.
using ZAndKl = std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>>;
ZAndKl student_t_rsample_kl_eager(const std::optional<at::Tensor>& df, const at::Tensor& loc,
                                  const at::Tensor& scale,
                                  const std::optional<at::Tensor>& prior_df, const at::Tensor& seed,
                                  const std::optional<at::Tensor>& rows,
                                  std::optional<int64_t> num_samples,
                                  std::string_view parameterization, std::string_view kl,
                                  bool kl_mean, bool return_z) {
  static const auto op = core::find_operator<core::Operator<decltype(student_t::forward)>>(
      "sqloss::student_t_rsample_kl");
  auto [z, of_kl] = op.call(df, loc, scale, prior_df, seed, rows, num_samples, parameterization, kl,
                            kl_mean, return_z);
  ZAndKl wanted;
  if (return_z) std::get<0>(wanted) = std::move(z);
  if (kl != "none") std::get<1>(wanted) = std::move(of_kl);
  return wanted;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability", core::cpu_capability);
  m.def("capability_of_cpu", core::capability_of_cpu);
  m.def("lesser_capability", core::lesser_capability);
  m.def("cvar", torch::wrap_pybind_function_no_gil(superquantile_eager<0>));
  m.def("value_at_risk", torch::wrap_pybind_function_no_gil(superquantile_eager<1>));
  m.def("distributed_superquantile",
        torch::wrap_pybind_function_no_gil(superquantile::distributed));
  m.def("distributed_superquantile_with_gradient",
        torch::wrap_pybind_function_no_gil(superquantile::distributed_with_gradient));
  m.def("pointwise_losses", torch::wrap_pybind_function_no_gil(pointwise_losses_eager));
  m.def("cross_entropy_losses", torch::wrap_pybind_function_no_gil(cross_entropy_losses_eager));
  m.def("cvar_pointwise", torch::wrap_pybind_function_no_gil(cvar_pointwise));
  m.def("draw_seed", torch::wrap_pybind_function_no_gil(draw_seed_eager));
  m.def("student_t_rsample_kl", torch::wrap_pybind_function_no_gil(student_t_rsample_kl_eager));
  m.def("cvar_cross_entropy", torch::wrap_pybind_function_no_gil(cvar_cross_entropy));
}

}  // namespace sqloss
