// The CUDA kernels of the pointwise losses as those of CPU tensors.
#include "pointwise_losses/pointwise_losses.cpp"

#include <torch/library.h>

#include "core/on.h"
#include "pointwise_losses/cuda.cu"

namespace sqloss::pointwise_losses {

TORCH_LIBRARY_IMPL(sqloss, CPU, m) {
  m.impl("pointwise_losses", core::On<forward, cuda_kernels>::call);
  m.impl("pointwise_losses_backward", core::On<backward, cuda_kernels>::call);
  m.impl("pointwise_losses_cvar", core::On<forward_cvar, cuda_kernels>::call);
}

}  // namespace sqloss::pointwise_losses
