// From tensors to the kernels' sequences: everything of Student-t sampling that is neither kernel
// nor autograd.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randint.h>
#include <c10/core/DeviceGuard.h>

#include <limits>
#include <mutex>
#include <numeric>
#include <utility>

#include "core/allocate.h"
#include "core/tensors.h"
#include "student_t/operators.h"

namespace sqloss::student_t {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <typename Named, size_t count>
Named named(const char* argument, std::string_view name,
            const std::pair<std::string_view, Named> (&all)[count]) {
  for (const auto& [known, value] : all) {
    if (known == name) return value;
  }
  TORCH_CHECK_VALUE(false, "student_t_rsample_kl: ", argument, ": expected the name of one, got '",
                    name, "'");
}

void check(const char* name, const at::Tensor& tensor, const at::Tensor& loc) {
  TORCH_CHECK_TYPE(core::has_kernels(tensor.scalar_type()), "student_t_rsample_kl: ", name,
                   ": expected float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == loc.device(), "student_t_rsample_kl: ", name,
                    ": expected the device of loc ", loc.device(), ", got ", tensor.device());
}

DfShape check_df(const char* name, const at::Tensor& df, const at::Tensor& loc) {
  check(name, df, loc);
  if (df.dim() == 0) return DfShape::kScalar;
  if (df.sizes() == loc.sizes()) return DfShape::kFull;
  TORCH_CHECK_VALUE(df.dim() == 1 && df.size(0) == loc.size(-1), "student_t_rsample_kl: ", name,
                    ": expected the shape of loc ", loc.sizes(), ", or its last dimension, or ",
                    "none, got ", df.sizes());
  return DfShape::kColumns;
}

core::Strided sequence(const at::Tensor& tensor) {
  at::DimVector order(tensor.dim());
  std::iota(order.begin(), order.end(), 0);
  return core::strided(tensor, order);
}

// The tensors of one call as sequences.
struct Call {
  Inputs inputs;
  at::ScalarType dtype;
  at::DimVector kl_shape;

  Call(const OptionalTensor& df, const at::Tensor& loc, const at::Tensor& scale,
       const OptionalTensor& prior_df, const at::Tensor& seed, const OptionalTensor& rows,
       std::optional<int64_t> num_samples, std::string_view parameterization, std::string_view kl,
       bool kl_mean) {
    inputs.parameterization = parameterization_named(parameterization);
    inputs.kl = kl_named(kl);
    inputs.mean = kl_mean;
    check("loc", loc, loc);
    check("scale", scale, loc);
    TORCH_CHECK_VALUE(loc.dim() > 0 && scale.sizes() == loc.sizes(),
                      "student_t_rsample_kl: scale: expected the shape of loc ", loc.sizes(),
                      ", of a dimension or more, got ", scale.sizes());
    if (df) inputs.df_shape = check_df("df", *df, loc);
    if (prior_df) inputs.prior_df_shape = check_df("prior_df", *prior_df, loc);
    const bool fits = inputs.kl == Kl::kAnalyticEntropy ? df.has_value()
                      : inputs.kl == Kl::kClosedForm    ? !df
                                                        : true;
    TORCH_CHECK_VALUE(fits, "student_t_rsample_kl: kl: expected analytic_entropy only with, and ",
                      "closed_form only without df, got ", kl);
    TORCH_CHECK_VALUE(df || !prior_df, "student_t_rsample_kl: prior_df: expected none without df");
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK_VALUE(!num_samples || (1 <= *num_samples && *num_samples <= kMost),
                      "student_t_rsample_kl: num_samples: expected 1 to ", kMost, ", got ",
                      num_samples.value_or(0));

    const at::IntArrayRef leading = loc.sizes().slice(0, loc.dim() - 1);
    TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && (!rows || rows->scalar_type() == at::kLong),
                     "student_t_rsample_kl: seed, rows: expected int64, got ", seed.scalar_type(),
                     rows ? " and " : "", rows ? at::toString(rows->scalar_type()) : "");
    TORCH_CHECK_VALUE(!rows || rows->sizes() == leading,
                      "student_t_rsample_kl: rows: expected the ", "leading shape of loc ", leading,
                      ", got ", rows ? rows->sizes() : at::IntArrayRef());
    TORCH_CHECK_VALUE(seed.device() == loc.device() && (!rows || rows->device() == loc.device()),
                      "student_t_rsample_kl: seed, rows: expected the device of loc ", loc.device(),
                      ", got ", seed.device(), rows ? " and " : "",
                      rows ? rows->device().str() : "");

    inputs.columns = loc.size(-1);
    inputs.rows = c10::multiply_integers(leading);
    inputs.num_samples = num_samples.value_or(1);
    if (df) inputs.df = df_sequence(*df, inputs.df_shape);
    inputs.loc = sequence(loc);
    inputs.scale = sequence(scale);
    if (prior_df) inputs.prior_df = df_sequence(*prior_df, inputs.prior_df_shape);
    inputs.seeds = seed.dim() == 0 ? core::repeated(seed, inputs.rows)
                                   : sequence(seed.expand(leading));  // raises its own error
    if (rows) inputs.row_ids = sequence(*rows);
    const bool is_double = loc.scalar_type() == at::kDouble || scale.scalar_type() == at::kDouble;
    dtype = is_double ? at::kDouble : at::kFloat;
    if (num_samples && !kl_mean) kl_shape.push_back(*num_samples);
    kl_shape.append(leading.begin(), leading.end());
  }

  core::Strided df_sequence(const at::Tensor& df, DfShape shape) const {
    if (shape == DfShape::kFull) return sequence(df);
    const bool scalar = shape == DfShape::kScalar;
    return core::repeated(df, scalar ? inputs.rows * inputs.columns : inputs.rows);
  }
};

}  // namespace

Parameterization parameterization_named(std::string_view name) {
  return named<Parameterization>("parameterization", name,
                                 {{"scale", Parameterization::kScale},
                                  {"log_scale", Parameterization::kLogScale},
                                  {"logvar", Parameterization::kLogvar}});
}

Kl kl_named(std::string_view name) {
  return named<Kl>("kl", name,
                   {{"none", Kl::kNone},
                    {"mc", Kl::kMc},
                    {"analytic_entropy", Kl::kAnalyticEntropy},
                    {"closed_form", Kl::kClosedForm}});
}

Outs forward(const Kernels& kernels, const OptionalTensor& df, const at::Tensor& loc,
             const at::Tensor& scale, const OptionalTensor& prior_df, const at::Tensor& seed,
             const OptionalTensor& rows, std::optional<int64_t> num_samples,
             std::string_view parameterization, std::string_view kl, bool kl_mean, bool return_z) {
  const c10::OptionalDeviceGuard guard(loc.device());
  const Call call(df, loc, scale, prior_df, seed, rows, num_samples, parameterization, kl, kl_mean);
  at::DimVector z_shape(loc.sizes());
  if (num_samples) z_shape.insert(z_shape.begin(), *num_samples);
  if (!return_z) z_shape = {0};
  const at::DimVector kl_shape = call.inputs.kl == Kl::kNone ? at::DimVector{0} : call.kl_shape;
  Outs outputs{core::empty(z_shape, loc.scalar_type(), loc),
               core::empty(kl_shape, call.dtype, loc)};
  Outputs out;
  if (return_z) out.z = sequence(std::get<0>(outputs));
  if (call.inputs.kl != Kl::kNone) out.kl = std::get<1>(outputs).data_ptr();
  if (loc.numel() > 0) {
    kernels.forward(call.inputs, core::dtype_of(call.dtype), out);
  } else {
    std::get<1>(outputs).zero_();  // of rows without columns
  }
  return outputs;
}

InputGradients backward(const Kernels& kernels, const OptionalTensor& grad_z,
                        const OptionalTensor& grad_kl, const OptionalTensor& df,
                        const at::Tensor& loc, const at::Tensor& scale,
                        const OptionalTensor& prior_df, const at::Tensor& seed,
                        const OptionalTensor& rows, std::optional<int64_t> num_samples,
                        std::string_view parameterization, std::string_view kl, bool kl_mean,
                        std::array<bool, 4> output_mask) {
  const c10::OptionalDeviceGuard guard(loc.device());
  const Call call(df, loc, scale, prior_df, seed, rows, num_samples, parameterization, kl, kl_mean);
  at::DimVector z_shape(loc.sizes());
  if (num_samples) z_shape.insert(z_shape.begin(), *num_samples);
  TORCH_CHECK_VALUE(!grad_z || (grad_z->device() == loc.device() && grad_z->sizes() == z_shape),
                    "student_t_rsample_kl_backward: grad_z: expected shape ",
                    at::IntArrayRef(z_shape), ", got ", grad_z ? grad_z->sizes() : z_shape);
  TORCH_CHECK_VALUE(!grad_kl || (grad_kl->device() == loc.device() &&
                                 grad_kl->sizes() == call.kl_shape && call.inputs.kl != Kl::kNone),
                    "student_t_rsample_kl_backward: grad_kl: expected shape ",
                    at::IntArrayRef(call.kl_shape), " of a KL that is wanted, got ",
                    grad_kl ? grad_kl->sizes() : at::IntArrayRef());
  Gradients gradients;
  if (grad_z) gradients.z = sequence(*grad_z);
  if (grad_kl) gradients.kl = sequence(*grad_kl);
  const auto gradient = [&](const OptionalTensor& of, bool wanted, core::Strided& written) {
    if (!wanted || !of) return core::empty({0}, loc.scalar_type(), loc);
    at::Tensor grad = core::empty(of->sizes(), of->scalar_type(), loc);
    if (call.inputs.rows == 0) grad.zero_();  // of scalar degrees of freedom, say
    written = sequence(grad);
    return grad;
  };
  InputGradients outputs{gradient(df, output_mask[0], gradients.df),
                         gradient(loc, output_mask[1], gradients.loc),
                         gradient(scale, output_mask[2], gradients.scale),
                         gradient(prior_df, output_mask[3], gradients.prior_df)};
  if (loc.numel() > 0) {
    kernels.backward(call.inputs, core::dtype_of(call.dtype), gradients);
  } else {
    std::get<0>(outputs).zero_();  // of degrees of freedom for no element
    std::get<3>(outputs).zero_();
  }
  return outputs;
}

NoiseTensors noise(const Kernels& kernels, const at::Tensor& loc, const at::Tensor& seed,
                   const OptionalTensor& rows, std::optional<int64_t> num_samples) {
  const c10::OptionalDeviceGuard guard(loc.device());
  const Call call(std::nullopt, loc, loc, std::nullopt, seed, rows, num_samples, "scale", "none",
                  false);
  at::DimVector shape(loc.sizes());
  if (num_samples) shape.insert(shape.begin(), *num_samples);
  NoiseTensors outputs{core::empty(shape, loc.scalar_type(), loc),
                       core::empty(shape, loc.scalar_type(), loc)};
  const NoiseOutputs out{sequence(std::get<0>(outputs)), sequence(std::get<1>(outputs))};
  if (loc.numel() > 0) kernels.noise(call.inputs, core::dtype_of(call.dtype), out);
  return outputs;
}

at::Tensor draw_seed(const std::optional<at::Generator>& generator, at::Device device) {
  if (!device.is_cpu()) return draw_seed_by_torch(generator, device);
  auto* const cpu = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  at::Tensor seed = at::detail::empty_cpu({}, at::kLong);
  const std::lock_guard<std::mutex> lock(cpu->mutex_);
  *seed.mutable_data_ptr<int64_t>() = static_cast<int64_t>(cpu->random64());
  return seed;
}

// On a GPU no bit of it passes through the host: each replay of a CUDA graph draws another.
at::Tensor draw_seed_by_torch(const std::optional<at::Generator>& generator, at::Device device) {
  constexpr auto kLimits = std::numeric_limits<int64_t>();
  return at::randint(kLimits.min(), kLimits.max(), {}, generator,
                     at::TensorOptions(device).dtype(at::kLong));
}

}  // namespace sqloss::student_t
