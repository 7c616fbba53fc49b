// From tensors to the kernels' matrices: everything of the superquantile that is neither kernel
// nor autograd.
#include "superquantile/superquantile.h"

#include <ATen/ATen.h>
#include <ATen/TensorUtils.h>
#include <ATen/WrapDimUtilsMulti.h>

#include "core/cpu_capability.h"

namespace sqloss::superquantile {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  static const CpuKernels& chosen =
      core::for_this_cpu(DEFAULT::kernels, &AVX2::kernels, &AVX512::kernels);
#else
  static const CpuKernels& chosen = core::for_this_cpu<CpuKernels>(DEFAULT::kernels, nullptr, nullptr);
#endif
  return chosen;
}

// How a reduction over `dim` sees a tensor: kept dimensions, then reduced ones.
struct Reduction {
  at::DimVector order;       // kept, then reduced
  at::DimVector kept_sizes;  // of the outputs
  int64_t rows = 1;
  int64_t n = 1;

  Reduction(const at::Tensor& losses, at::IntArrayRef dim, bool keepdim) {
    const auto reduced = at::dim_list_to_bitset(dim, losses.dim());
    for (const int64_t d : c10::irange(losses.dim())) {
      const bool kept = !dim.empty() && !reduced[d];
      if (kept) {
        order.push_back(d);
        rows *= losses.size(d);
      }
      if (kept || keepdim) kept_sizes.push_back(kept ? losses.size(d) : 1);
    }
    for (const int64_t d : c10::irange(losses.dim())) {
      if (dim.empty() || reduced[d]) {
        order.push_back(d);
        n *= losses.size(d);
      }
    }
  }

  // A view where the strides allow it, else a copy.
  at::Tensor as_matrix(const at::Tensor& tensor) const {
    return tensor.permute(order).reshape({rows, n});
  }

  // An empty tensor like `losses` of which as_matrix is a view.
  at::Tensor empty_like(const at::Tensor& losses) const {
    at::Tensor like = at::empty_like(losses);
    const at::Tensor permuted = like.permute(order);
    const at::DimVector matrix{rows, n};
    if (at::detail::computeStride(permuted.sizes(), permuted.strides(), at::IntArrayRef(matrix))) {
      return like;
    }
    at::DimVector inverse(order.size());
    for (const auto i : c10::irange(order.size())) inverse[order[i]] = static_cast<int64_t>(i);
    return at::empty(permuted.sizes(), losses.options()).permute(inverse);
  }
};

Matrix matrix_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.data_ptr(), tensor.scalar_type(), tensor.stride(0), tensor.stride(1)};
}

// The matrices of a reduction, and the tensors that own their memory.
struct Inputs {
  at::Tensor losses, weight, mask;

  Inputs(const Reduction& reduction, const at::Tensor& losses_, const OptionalTensor& weight_,
         const OptionalTensor& mask_)
      : losses(reduction.as_matrix(losses_)) {
    if (weight_) {
      const auto dtype = weight_->scalar_type();
      const bool exact_in_float = at::isReducedFloatingType(dtype) || dtype == at::kFloat;
      weight = reduction.as_matrix(weight_->to(exact_in_float ? at::kFloat : at::kDouble));
    }
    if (mask_) mask = reduction.as_matrix(*mask_);
  }

  Losses view(const Reduction& reduction) const {
    return {reduction.rows, reduction.n, matrix_of(losses), matrix_of(weight), matrix_of(mask)};
  }
};

// Guards memory for callers of the operators; sqloss/superquantile.py tells its users more.
void check_inputs(const at::Tensor& losses, const OptionalTensor& weight,
                  const OptionalTensor& mask) {
  TORCH_CHECK_TYPE(losses.is_floating_point(),
                   "superquantile: losses: expected a floating-point tensor, got ",
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
  TORCH_CHECK_TYPE(!mask || mask->scalar_type() == at::kBool,
                   "superquantile: mask: expected a bool tensor, got ", mask->scalar_type());
}

using BackwardKernel = void (*)(const Losses&, const Tails&, const Gradients&, const Matrix&);

at::Tensor backward_with(BackwardKernel kernel, const OptionalTensor& grad_value,
                         const OptionalTensor& grad_threshold, const at::Tensor& losses,
                         const OptionalTensor& weight, const OptionalTensor& mask,
                         const at::Tensor& threshold, const at::Tensor& counts,
                         at::IntArrayRef dim, bool keepdim) {
  check_inputs(losses, weight, mask);
  const Reduction reduction(losses, dim, keepdim);
  at::Tensor grad_losses = reduction.empty_like(losses);
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

  const Inputs inputs(reduction, losses, weight, mask);
  kernel(inputs.view(reduction),
         {nullptr, thresholds.data_ptr(), static_cast<Counts*>(counts3.data_ptr())},
         {of_value.defined() ? of_value.data_ptr() : nullptr,
          of_threshold.defined() ? of_threshold.data_ptr() : nullptr},
         matrix_of(reduction.as_matrix(grad_losses)));
  return grad_losses;
}

}  // namespace

Outputs forward_cpu(const at::Tensor& losses, const at::Tensor& tail_fraction,
                    const OptionalTensor& weight, const OptionalTensor& mask, at::IntArrayRef dim,
                    bool keepdim) {
  check_inputs(losses, weight, mask);
  const Reduction reduction(losses, dim, keepdim);
  TORCH_CHECK_VALUE(reduction.n > 0,
                    "superquantile: losses: expected at least one loss in every reduction, got ",
                    "shape ", losses.sizes());
  const double fraction = tail_fraction.item<double>();
  TORCH_CHECK_VALUE(fraction > 0 && fraction <= 1,
                    "superquantile: tail_fraction: expected a number in (0, 1], got ", fraction);

  at::DimVector counts_sizes = reduction.kept_sizes;
  counts_sizes.push_back(3);
  Outputs outputs{at::empty(reduction.kept_sizes, losses.options()),
                  at::empty(reduction.kept_sizes, losses.options()),
                  at::empty(counts_sizes, losses.options().dtype(at::kDouble))};
  if (reduction.rows == 0) return outputs;

  const Inputs inputs(reduction, losses, weight, mask);
  const auto& [value, threshold, counts] = outputs;
  cpu_kernels().forward(
      inputs.view(reduction), fraction,
      {value.data_ptr(), threshold.data_ptr(), static_cast<Counts*>(counts.data_ptr())});
  return outputs;
}

at::Tensor backward_cpu(const OptionalTensor& grad_value, const OptionalTensor& grad_threshold,
                        const at::Tensor& losses, const OptionalTensor& weight,
                        const OptionalTensor& mask, const at::Tensor& threshold,
                        const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
  return backward_with(cpu_kernels().backward, grad_value, grad_threshold, losses, weight, mask,
                       threshold, counts, dim, keepdim);
}

#ifdef SQLOSS_WITH_CUDA
at::Tensor backward_cuda(const OptionalTensor& grad_value, const OptionalTensor& grad_threshold,
                         const at::Tensor& losses, const OptionalTensor& weight,
                         const OptionalTensor& mask, const at::Tensor& threshold,
                         const at::Tensor& counts, at::IntArrayRef dim, bool keepdim) {
  const at::OptionalDeviceGuard guard(losses.device());
  return backward_with(cuda_backward, grad_value, grad_threshold, losses, weight, mask, threshold,
                       counts, dim, keepdim);
}
#endif

}  // namespace sqloss::superquantile
