// Autograd of Student-t and normal samples with their KL. The only file that knows both directions.
//
// The first derivatives are the backward operator's, which saves nothing but the inputs: the seed
// draws the samples again. What it returns is differentiable too: where that is asked for it is
// computed by formulas of differentiable operators instead, which is slower and takes temporary
// tensors, but leaves every further derivative to torch. Tangents of forward mode take the same
// formulas.
#include "core/autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "core/on.h"
#include "student_t/operators.h"

namespace sqloss::student_t {
namespace {

using core::OptionalTensor;
using torch::autograd::variable_list;

// (1 - exp(-x)) / x - 1. Each branch gets an x at which its derivatives are finite, also where the
// other one is taken.
at::Tensor psi_less_1(const at::Tensor& x) {
  constexpr double kSmall = 0.5;
  constexpr int kTerms = 14;
  const at::Tensor small = x < kSmall;
  const at::Tensor low = at::where(small, x, at::zeros_like(x));
  const at::Tensor high = at::where(small, at::ones_like(x), x);
  at::Tensor series = at::zeros_like(x);  // sum of (-x)^k / (k + 1)! for k from 1
  for (int k = kTerms; k > 0; --k) series = -low / (k + 1) * (1 + series);
  return at::where(small, series, -at::expm1(-high) / high - 1);
}

// A call of the operator.
struct Call {
  OptionalTensor df;
  at::Tensor loc, scale;
  OptionalTensor prior_df;
  at::Tensor seed;
  OptionalTensor rows;
  std::optional<int64_t> num_samples;
  std::string parameterization, kl;
  bool kl_mean;

  Outs outputs(bool return_z) const {
    static const auto op = core::find_operator<core::Operator<decltype(student_t::forward)>>(
        "sqloss::student_t_rsample_kl");
    return op.call(df, loc, scale, prior_df, seed, rows, num_samples, parameterization, kl, kl_mean,
                   return_z);
  }

  InputGradients gradients(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                           std::array<bool, 4> output_mask) const {
    static const auto op = core::find_operator<core::Operator<decltype(student_t::backward)>>(
        "sqloss::student_t_rsample_kl_backward");
    return op.call(grad_z, grad_kl, df, loc, scale, prior_df, seed, rows, num_samples,
                   parameterization, kl, kl_mean, output_mask);
  }

  bool any_tangent() const {
    return torch::autograd::isFwGradDefined(df) || torch::autograd::isFwGradDefined(loc) ||
           torch::autograd::isFwGradDefined(scale) || torch::autograd::isFwGradDefined(prior_df);
  }
};

// The first derivative of rho at x = df / 2 and x times the second, given 1 / df, which may be 0:
// the series of student_t_math.h, small x shifted up.
struct RhoDerivatives {
  at::Tensor first, second_times_x;

  explicit RhoDerivatives(const at::Tensor& inverse_df) {
    constexpr int kShift = 8;
    // (2 k + 1) times the k-th coefficient
    constexpr double kSeries[] = {
        1.0 / 8,          -3.0 / 192,           5.0 / 640,           -7.0 * 17 / 14336,
        9.0 * 31 / 18432, -11.0 * 691 / 180224, 13.0 * 5461 / 425984};

    const at::Tensor shifted = inverse_df > 1.0 / 40;
    const at::Tensor from = 0.5 / at::where(shifted, inverse_df, 1.0), to = from + kShift;
    const at::Tensor inverse = at::where(shifted, 1 / to, 2 * inverse_df),
                     square = inverse * inverse;
    at::Tensor of_first = at::zeros_like(inverse), of_second = of_first;
    for (int k = std::size(kSeries) - 1; k >= 0; --k) {
      of_first = of_first * square - kSeries[k];
      of_second = of_second * square + (2 * k + 2) * kSeries[k];
    }

    at::Tensor sum_of_first = at::zeros_like(from), sum_of_second = sum_of_first;
    for (int i = 0; i < kShift; ++i) {
      const at::Tensor a = from + i, b = a + 0.5, ab = a * b;
      sum_of_first = sum_of_first + 1 / ab;
      sum_of_second = sum_of_second + (a + b) / (ab * ab);
    }
    const at::Tensor squares = 1 / (to * to) - 1 / (from * from);
    const at::Tensor more_of_first = 0.5 * (kShift / (from * to) - sum_of_first);
    const at::Tensor more_of_second = 0.5 * from * (squares + sum_of_second);
    first = of_first * square + at::where(shifted, more_of_first, 0.0);
    second_times_x = of_second * square * at::where(shifted, from * inverse, 1.0) +
                     at::where(shifted, more_of_second, 0.0);
  }
};

// The derivatives of the elements' z and KL by differentiable operators; formulas as in
// student_t_math.h, but in double, whatever the dtype of the noise: those in a large df cancel. Per
// sample unless said otherwise; undefined where they do not exist.
class Derivatives {
 public:
  at::Tensor t;           // = d z / d scale
  at::Tensor scale;       // per element: the scale itself,
  double log_factor = 0;  // and d log(scale) / d parameter of the logarithmic parameterizations
  at::Tensor z_in_df;
  at::Tensor kl_in_z;   // of the sampled forms
  at::Tensor kl_in_df;  // besides what goes through z
  at::Tensor kl_in_prior_df;
  bool closed_form;
  at::Tensor loc;

  explicit Derivatives(const Call& call) : closed_form(call.kl == "closed_form") {
    const at::ScalarType dtype =
        call.loc.scalar_type() == at::kDouble || call.scale.scalar_type() == at::kDouble
            ? at::kDouble
            : at::kFloat;
    loc = call.loc.to(at::kDouble);
    scale = call.scale.to(at::kDouble);
    if (call.parameterization != "scale") {
      log_factor = call.parameterization == "logvar" ? 0.5 : 1.0;
      scale = at::exp(log_factor * scale);
    }
    static const auto noise_op =
        core::find_operator<core::Operator<decltype(student_t::noise)>>("sqloss::student_t_noise");
    auto [energy, cosine] =
        noise_op.call(call.loc.to(dtype), call.seed, call.rows, call.num_samples);
    // The root's derivative at 0 is not finite.
    energy = at::clamp_min(energy.to(at::kDouble), std::numeric_limits<float>::min());
    cosine = cosine.to(at::kDouble);
    if (!call.df) {
      t = at::sqrt(energy) * cosine;
      if (call.kl == "mc") kl_in_z = loc + scale * t;
      return;
    }

    const at::Tensor df = positive(*call.df), inverse = 1 / df, e = energy * inverse;
    const at::Tensor less_1 = psi_less_1(e), psi = 1 + less_1;
    t = at::sqrt(energy * psi) * at::exp(e / 2) * cosine;
    z_in_df = scale * (0.5 * t * inverse * (less_1 / psi));
    if (call.kl == "none") return;

    const at::Tensor z = loc + scale * t;
    const at::Tensor prior_df = call.prior_df ? positive(*call.prior_df) : df;
    const at::Tensor inverse_prior = 1 / prior_df, square = z * z * inverse_prior;
    kl_in_z = (1 + inverse_prior) * z / (1 + square);
    kl_in_prior_df = 0.5 * at::log1p(square) - 0.5 * (1 + inverse_prior) * square / (1 + square) +
                     log_z_in_df(inverse_prior);
    if (call.kl == "analytic_entropy") {
      // The entropy is (df + 1) / 2 * (1 / df - rho'(df / 2)) + log Z.
      const at::Tensor of_rho = 0.5 * (1 + inverse) * RhoDerivatives(inverse).second_times_x;
      kl_in_df = (0.5 * inverse * inverse + of_rho).expand_as(t);
    } else {
      const at::Tensor cosine2 = cosine * cosine;
      const at::Tensor scaled_square = cosine2 + (1 - cosine2) * at::exp(-e);
      kl_in_df = 0.5 * (1 + inverse) * e * cosine2 / scaled_square -
                 0.5 * at::log1p(t * t * inverse) - log_z_in_df(inverse);
    }
  }

 private:
  static at::Tensor positive(const at::Tensor& df) {
    return df.to(at::kDouble).masked_fill(df <= 0, std::numeric_limits<double>::quiet_NaN());
  }
  static at::Tensor log_z_in_df(const at::Tensor& inverse_df) {
    return 0.5 * RhoDerivatives(inverse_df).first;
  }
};

// The gradients, differentiable in those of the outputs and in the inputs.
InputGradients differentiable_gradients(const Call& call, const OptionalTensor& grad_z,
                                        const OptionalTensor& grad_kl,
                                        std::array<bool, 4> output_mask) {
  const Derivatives in(call);
  const auto over_samples = [&](const at::Tensor& x) { return call.num_samples ? x.sum(0) : x; };
  // Of a sample's KL, for each of its elements; and of all of them.
  at::Tensor of_sample, of_all;
  if (grad_kl) {
    const at::Tensor grad = grad_kl->unsqueeze(-1);
    const bool averaged = call.num_samples && call.kl_mean;
    of_sample = averaged ? grad / *call.num_samples : grad;
    of_all = averaged || !call.num_samples ? grad : grad.sum(0);
  }
  const auto plus = [](const at::Tensor& a, const at::Tensor& b) {
    return !a.defined() ? b : b.defined() ? a + b : a;
  };
  const auto times = [](const at::Tensor& a, const at::Tensor& b) {
    return a.defined() && b.defined() ? a * b : at::Tensor();
  };
  const at::Tensor in_z =
      plus(grad_z ? grad_z->to(in.t.scalar_type()) : at::Tensor(), times(of_sample, in.kl_in_z));
  const auto through_z = [&](const at::Tensor& derivative) {
    return in_z.defined() ? over_samples(in_z * derivative) : at::Tensor();
  };
  const auto summed = [&](const at::Tensor& x) { return x.defined() ? over_samples(x) : x; };

  at::Tensor in_loc = in_z.defined() ? over_samples(in_z) : at::Tensor();
  at::Tensor in_scale = through_z(in.t);
  if (in.closed_form) {
    in_loc = plus(in_loc, times(of_all, in.loc));
    in_scale = plus(in_scale, times(of_all, in.scale));
  }
  const at::Tensor in_log_scale = of_all.defined() ? -of_all : at::Tensor();
  if (in.log_factor > 0) {
    in_scale = plus(times(in_scale, in.scale), in_log_scale);
    if (in_scale.defined()) in_scale = in.log_factor * in_scale;
  } else {
    in_scale = plus(in_scale, of_all.defined() ? in_log_scale / in.scale : at::Tensor());
  }
  at::Tensor in_df, in_prior_df = summed(times(of_sample, in.kl_in_prior_df));
  if (call.df) {
    in_df = plus(through_z(in.z_in_df), summed(times(of_sample, in.kl_in_df)));
    if (!call.prior_df) in_df = plus(in_df, in_prior_df);
  }

  const auto gradient = [&](const OptionalTensor& of, const at::Tensor& grad, bool wanted) {
    if (!wanted || !of) return at::empty({0}, call.loc.options());
    if (!grad.defined()) return at::zeros_like(*of);
    return grad.sum_to_size(of->sizes()).to(of->scalar_type());
  };
  return {gradient(call.df, in_df, output_mask[0]), gradient(call.loc, in_loc, output_mask[1]),
          gradient(call.scale, in_scale, output_mask[2]),
          gradient(call.prior_df, in_prior_df, output_mask[3])};
}

// How the outputs move with the inputs: the adjoint of their gradients.
void set_tangents(const Call& call, const Outs& outputs, bool return_z) {
  Call primals = call;
  if (call.df) primals.df = core::primal(*call.df);
  primals.loc = core::primal(call.loc);
  primals.scale = core::primal(call.scale);
  if (call.prior_df) primals.prior_df = core::primal(*call.prior_df);
  const Derivatives in(primals);
  const at::ScalarType dtype = in.t.scalar_type();
  const auto tangent = [&](const OptionalTensor& of) {
    const OptionalTensor moves = core::tangent(of);
    return moves ? moves->to(dtype) : at::Tensor();
  };
  const at::Tensor df = tangent(call.df), loc = tangent(call.loc);
  const at::Tensor prior_df = call.prior_df ? tangent(call.prior_df) : df;
  at::Tensor scale = tangent(call.scale);  // becomes that of the scale itself
  if (scale.defined() && in.log_factor > 0) scale = in.log_factor * in.scale * scale;

  at::Tensor z = at::zeros_like(in.t);
  if (loc.defined()) z = z + loc;
  if (scale.defined()) z = z + in.t * scale;
  if (df.defined()) z = z + in.z_in_df * df;
  const auto& [out_z, out_kl] = outputs;
  if (return_z) core::set_tangent(out_z, z.to(out_z.scalar_type()));
  if (call.kl == "none") return;

  at::Tensor kl = at::zeros_like(in.t);
  if (in.kl_in_z.defined()) kl = kl + in.kl_in_z * z;
  if (in.closed_form && loc.defined()) kl = kl + in.loc * loc;
  if (in.closed_form && scale.defined()) kl = kl + in.scale * scale;
  if (scale.defined()) kl = kl - scale / in.scale;
  if (df.defined()) kl = kl + in.kl_in_df * df;
  if (prior_df.defined()) kl = kl + in.kl_in_prior_df * prior_df;
  kl = kl.sum(-1);
  if (call.num_samples && call.kl_mean) kl = kl.mean(0);
  core::set_tangent(out_kl, kl.to(out_kl.scalar_type()));
}

struct StudentTBackward final : core::SavingNode {
  void save(const Call& call, bool return_z) {
    return_z_ = return_z;
    SavingNode::save({call.df, call.loc, call.scale, call.prior_df, call.seed, call.rows});
    call_ = call;
    call_.loc = call_.scale = call_.seed = at::Tensor();  // saved, and freed with what is
    call_.df = call_.prior_df = call_.rows = std::nullopt;
  }

  variable_list apply(variable_list&& grads) override {
    std::array<bool, 4> wanted;
    bool any = false;
    for (size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = task_should_compute_output(i);
      any = any || wanted[i];
    }
    variable_list gradients(wanted.size());
    if (!any || !(grads[0].defined() || grads[1].defined())) return gradients;
    Call call = call_;
    const auto saved = unpack();
    call.df = core::optional(saved[0]);
    call.loc = saved[1];
    call.scale = saved[2];
    call.prior_df = core::optional(saved[3]);
    call.seed = saved[4];
    call.rows = core::optional(saved[5]);
    // Of an output that is not wanted the gradient, where torch makes one, is as empty as that.
    const auto [df, loc, scale, prior_df] =
        call.gradients(return_z_ ? core::optional(grads[0]) : std::nullopt,
                       call.kl != "none" ? core::optional(grads[1]) : std::nullopt, wanted);
    if (wanted[0]) gradients[0] = df;
    if (wanted[1]) gradients[1] = loc;
    if (wanted[2]) gradients[2] = scale;
    if (wanted[3]) gradients[3] = prior_df;
    return gradients;
  }
  std::string name() const override { return "StudentTBackward"; }

 protected:
  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(call_.num_samples.value_or(0));
    args.collect(call_.parameterization);
    args.collect(call_.kl);
    args.collect(call_.kl_mean);
    args.collect(return_z_);
  }

 private:
  Call call_;
  bool return_z_ = true;
};

Outs forward_autograd(const OptionalTensor& df, const at::Tensor& loc, const at::Tensor& scale,
                      const OptionalTensor& prior_df, const at::Tensor& seed,
                      const OptionalTensor& rows, std::optional<int64_t> num_samples,
                      std::string_view parameterization, std::string_view kl, bool kl_mean,
                      bool return_z) {
  const Call call{df,
                  loc,
                  scale,
                  prior_df,
                  seed,
                  rows,
                  num_samples,
                  std::string(parameterization),
                  std::string(kl),
                  kl_mean};
  const Outs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return call.outputs(return_z);
  }();
  if (call.any_tangent()) set_tangents(call, outputs, return_z);
  if (torch::autograd::compute_requires_grad(df, loc, scale, prior_df)) {
    const auto node = core::make_node<StudentTBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(df, loc, scale, prior_df));
    node->save(call, return_z);
    torch::autograd::set_history(std::get<0>(outputs), node);
    torch::autograd::set_history(std::get<1>(outputs), node);
  }
  return outputs;
}

InputGradients backward_autograd(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                                 const OptionalTensor& df, const at::Tensor& loc,
                                 const at::Tensor& scale, const OptionalTensor& prior_df,
                                 const at::Tensor& seed, const OptionalTensor& rows,
                                 std::optional<int64_t> num_samples,
                                 std::string_view parameterization, std::string_view kl,
                                 bool kl_mean, std::array<bool, 4> output_mask) {
  const Call call{df,
                  loc,
                  scale,
                  prior_df,
                  seed,
                  rows,
                  num_samples,
                  std::string(parameterization),
                  std::string(kl),
                  kl_mean};
  if (torch::autograd::compute_requires_grad(grad_z, grad_kl, df, loc, scale, prior_df) ||
      torch::autograd::isFwGradDefined(grad_z) || torch::autograd::isFwGradDefined(grad_kl) ||
      call.any_tangent()) {
    return differentiable_gradients(call, grad_z, grad_kl, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call.gradients(grad_z, grad_kl, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(sqloss, Autograd, m) {
  m.impl("student_t_rsample_kl", forward_autograd);
  m.impl("student_t_rsample_kl_backward", backward_autograd);
  // Of loc it takes the shape and dtype alone: nothing to derive.
  m.impl("student_t_noise", torch::CppFunction::makeFallthrough());
}

}  // namespace sqloss::student_t
