// From tensors to the kernels' matrices: everything of the superquantile that is neither kernel
// nor autograd.
#include <ATen/TensorUtils.h>
#include <ATen/WrapDimUtilsMulti.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include "core/allocate.h"
#include "core/tensors.h"
#include "superquantile/operators.h"

namespace sqloss::superquantile {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// How a reduction over `dim` sees tensors of the losses' shape: kept dimensions, then reduced ones.
struct Reduction {
  at::DimVector order;         // kept, then reduced
  at::DimVector sizes;         // in that order
  at::DimVector output_sizes;  // of value and threshold
  int64_t rows = 1;
  int64_t n = 1;

  Reduction(const at::Tensor& losses, at::IntArrayRef dim, bool keepdim) {
    for (const int64_t d : dim) {
      TORCH_CHECK_INDEX(0 <= d && d < losses.dim(), "superquantile: dim: expected to be in [0, ",
                        losses.dim() - 1, "] for losses of shape ", losses.sizes(), ", got ", d);
    }
    const auto listed = at::dim_list_to_bitset(dim, losses.dim());
    const auto reduced = [&](int64_t d) { return dim.empty() || listed[d]; };
    for (const int64_t d : c10::irange(losses.dim())) {
      if (!reduced(d)) add(d, losses.size(d), rows);
      if (!reduced(d) || keepdim) output_sizes.push_back(reduced(d) ? 1 : losses.size(d));
    }
    for (const int64_t d : c10::irange(losses.dim())) {
      if (reduced(d)) add(d, losses.size(d), n);
    }
  }

  // The strides of a view [rows, n] of a tensor, if there is one.
  std::optional<at::DimVector> matrix_strides(const at::Tensor& tensor) const {
    at::DimVector strides;
    for (const int64_t d : order) strides.push_back(tensor.stride(d));
    return at::detail::computeStride(sizes, strides, at::DimVector{rows, n});
  }

 private:
  void add(int64_t d, int64_t size, int64_t& extent) {
    order.push_back(d);
    sizes.push_back(size);
    extent *= size;
  }
};

// A tensor seen as [rows, n], and what owns that memory: the tensor, or a copy where its strides
// make no matrix.
struct MatrixView {
  at::Tensor owner;
  Matrix matrix;

  MatrixView() = default;
  MatrixView(const Reduction& reduction, const at::Tensor& tensor) : owner(tensor) {
    auto strides = reduction.matrix_strides(tensor);
    if (!strides) {
      owner = tensor.permute(reduction.order).contiguous();
      strides = at::DimVector{reduction.n, 1};
    }
    matrix = {owner.data_ptr(), core::dtype_of(owner.scalar_type()), (*strides)[0], (*strides)[1]};
  }
};

struct Inputs {
  MatrixView losses, weight, mask;

  Inputs(const Reduction& reduction, const at::Tensor& losses_, const OptionalTensor& weight_,
         const OptionalTensor& mask_)
      : losses(reduction, losses_) {
    if (weight_) {
      const auto dtype = weight_->scalar_type();
      const bool exact_in_float = at::isReducedFloatingType(dtype) || dtype == at::kFloat;
      weight = MatrixView(reduction, weight_->to(exact_in_float ? at::kFloat : at::kDouble));
    }
    if (mask_) mask = MatrixView(reduction, *mask_);
  }

  Losses view(const Reduction& reduction, const Caller& caller = {}) const {
    return {reduction.rows, reduction.n, losses.matrix, weight.matrix, mask.matrix, caller};
  }
};

// Guards memory for callers of the operators; sqloss/superquantile.py tells its users more.
void check_inputs(const at::Tensor& losses, const OptionalTensor& weight,
                  const OptionalTensor& mask) {
  TORCH_CHECK_TYPE(core::has_kernels(losses.scalar_type()),
                   "superquantile: losses: expected float16, bfloat16, float32 or float64, got ",
                   losses.scalar_type());
  for (const auto& [name, tensor] : {std::pair("weight", &weight), std::pair("mask", &mask)}) {
    if (!*tensor) continue;
    TORCH_CHECK_VALUE((*tensor)->sizes() == losses.sizes(), "superquantile: ", name,
                      ": expected the shape of losses ", losses.sizes(), ", got ",
                      (*tensor)->sizes());
    TORCH_CHECK_VALUE((*tensor)->device() == losses.device(), "superquantile: ", name,
                      ": expected the device of losses ", losses.device(), ", got ",
                      (*tensor)->device());
  }
  TORCH_CHECK_TYPE(!weight || !weight->is_complex(),
                   "superquantile: weight: expected a real tensor, got ", weight->scalar_type());
  TORCH_CHECK_TYPE(!mask || mask->scalar_type() == at::kBool,
                   "superquantile: mask: expected a bool tensor, got ", mask->scalar_type());
}

TailFraction read(const at::Tensor& tail_fraction, const at::Tensor& losses,
                  std::string_view function) {
  TORCH_CHECK_TYPE(
      tail_fraction.scalar_type() == at::kDouble && tail_fraction.numel() == 1 &&
          (tail_fraction.is_cpu() || tail_fraction.device() == losses.device()),
      "superquantile: tail_fraction: expected one float64 on the CPU or the device of ",
      "losses, got ", tail_fraction.numel(), " ", tail_fraction.scalar_type(), " on ",
      tail_fraction.device());
  const double* const data = tail_fraction.const_data_ptr<double>();
  if (!tail_fraction.is_cpu()) return TailFraction(data);
  TORCH_CHECK_VALUE(*data > 0 && *data <= 1, function,
                    ": alpha, tail_fraction: expected alpha in [0, 1) or tail_fraction in (0, 1], ",
                    "got alpha = ", 1 - *data, ", tail_fraction = ", *data);
  return *data;
}

}  // namespace

Outputs forward(const Kernels& kernels, const at::Tensor& losses, const at::Tensor& tail_fraction,
                const OptionalTensor& weight, const OptionalTensor& mask, at::IntArrayRef dim,
                bool keepdim, std::string_view function, std::string_view none_counts) {
  check_inputs(losses, weight, mask);
  const c10::OptionalDeviceGuard guard(losses.device());
  const Reduction reduction(losses, dim, keepdim);
  TORCH_CHECK_VALUE(reduction.n > 0,
                    "superquantile: losses: expected at least one loss in every reduction, got ",
                    "shape ", losses.sizes());
  const TailFraction fraction = read(tail_fraction, losses, function);

  at::DimVector counts_sizes = reduction.output_sizes;
  counts_sizes.push_back(3);
  const auto dtype = losses.scalar_type();
  Outputs outputs{core::empty(reduction.output_sizes, dtype, losses),
                  core::empty(reduction.output_sizes, dtype, losses),
                  core::empty(counts_sizes, at::kDouble, losses)};
  if (reduction.rows == 0) return outputs;

  const Inputs inputs(reduction, losses, weight, mask);
  const auto& [value, threshold, counts] = outputs;
  kernels.forward(
      inputs.view(reduction, {function, none_counts}), fraction,
      {value.data_ptr(), threshold.data_ptr(), static_cast<Counts*>(counts.data_ptr())});
  return outputs;
}

at::Tensor backward(const Kernels& kernels, const OptionalTensor& grad_value,
                    const OptionalTensor& grad_threshold, const at::Tensor& losses,
                    const OptionalTensor& weight, const OptionalTensor& mask,
                    const at::Tensor& threshold, const at::Tensor& counts, at::IntArrayRef dim,
                    bool keepdim) {
  check_inputs(losses, weight, mask);
  const c10::OptionalDeviceGuard guard(losses.device());
  const Reduction reduction(losses, dim, keepdim);
  at::Tensor grad_losses = core::empty_like(losses);
  if (grad_losses.numel() == 0) return grad_losses;

  const auto one_per_row = [&](const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                               int64_t each = 1) {
    TORCH_CHECK_VALUE(tensor.numel() == reduction.rows * each && tensor.scalar_type() == dtype &&
                          tensor.device() == losses.device(),
                      "superquantile_backward: ", name, ": expected ", reduction.rows * each, " ",
                      dtype, " on ", losses.device(), ", got ", tensor.numel(), " ",
                      tensor.scalar_type(), " on ", tensor.device());
    return tensor.contiguous();
  };
  const auto gradient_of = [&](const OptionalTensor& grad, const char* name) {
    return grad ? one_per_row(*grad, name, losses.scalar_type()) : at::Tensor();
  };
  const at::Tensor thresholds = one_per_row(threshold, "threshold", losses.scalar_type());
  const at::Tensor counts3 = one_per_row(counts, "counts", at::kDouble, 3);
  const at::Tensor of_value = gradient_of(grad_value, "grad_value");
  const at::Tensor of_threshold = gradient_of(grad_threshold, "grad_threshold");

  // Where the gradient's own strides make no matrix, the kernel writes to one that is copied.
  at::Tensor rows;
  if (!reduction.matrix_strides(grad_losses)) {
    rows = at::empty({reduction.rows, reduction.n}, losses.options());
  }
  const Matrix grad =
      rows.defined() ? Matrix{rows.data_ptr(), core::dtype_of(rows.scalar_type()), reduction.n, 1}
                     : MatrixView(reduction, grad_losses).matrix;
  const Inputs inputs(reduction, losses, weight, mask);
  kernels.backward(inputs.view(reduction),
                   {nullptr, thresholds.data_ptr(), static_cast<Counts*>(counts3.data_ptr())},
                   {of_value.defined() ? of_value.data_ptr() : nullptr,
                    of_threshold.defined() ? of_threshold.data_ptr() : nullptr},
                   grad);
  if (rows.defined()) {
    grad_losses.permute(reduction.order).copy_(rows.view(reduction.sizes));
  }
  return grad_losses;
}

}  // namespace sqloss::superquantile
