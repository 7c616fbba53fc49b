// The tail of losses by the kernel that computes them: what operators of such kernels share.
#pragma once

#include <ATen/core/Tensor.h>

#include <numeric>
#include <optional>

#include "core/allocate.h"
#include "core/tensors.h"
#include "superquantile/fused_tail.h"

namespace sqloss::superquantile {

// The outputs of an operator that has such a kernel, besides the losses: as those of forward() for
// the tail of all of them.
struct FusedTailOutputs {
  at::Tensor value, threshold, counts;
  FusedTail tail;

  FusedTailOutputs(const char* function, const at::Tensor& tail_fraction,
                   const std::optional<at::Tensor>& extra, const at::Tensor& losses)
      : value(core::empty({}, losses.scalar_type(), losses)),
        threshold(core::empty({}, losses.scalar_type(), losses)),
        counts(core::empty({3}, at::kDouble, losses)) {
    TORCH_CHECK_VALUE(1 <= losses.numel() && losses.numel() <= kMostFusedLosses, function,
                      ": input: expected 1 to ", kMostFusedLosses, " losses, got ", losses.numel());
    TORCH_CHECK_TYPE(tail_fraction.scalar_type() == at::kDouble && tail_fraction.is_cpu() &&
                         tail_fraction.numel() == 1,
                     function, ": tail_fraction: expected one float64 on the CPU, got ",
                     tail_fraction.numel(), " ", tail_fraction.scalar_type(), " on ",
                     tail_fraction.device());
    tail.tail_fraction = *tail_fraction.const_data_ptr<double>();
    TORCH_CHECK_VALUE(tail.tail_fraction > 0 && tail.tail_fraction <= 1, function,
                      ": tail_fraction: expected a number in (0, 1], got ", tail.tail_fraction);
    if (extra) {
      TORCH_CHECK_VALUE(extra->sizes() == losses.sizes() &&
                            extra->scalar_type() == losses.scalar_type() &&
                            extra->device() == losses.device(),
                        function, ": extra: expected ", losses.scalar_type(), " of shape ",
                        losses.sizes(), " on ", losses.device(), ", got ", extra->scalar_type(),
                        " of shape ", extra->sizes(), " on ", extra->device());
      at::DimVector order(losses.dim());
      std::iota(order.begin(), order.end(), 0);
      tail.extra = core::strided(*extra, order);
    }
    tail.tails = {value.data_ptr(), threshold.data_ptr(), static_cast<Counts*>(counts.data_ptr())};
  }
};

}  // namespace sqloss::superquantile
