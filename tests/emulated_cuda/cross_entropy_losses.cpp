// The CUDA kernels of the cross-entropy as those of CPU tensors.
#include "cross_entropy_losses/cross_entropy_losses.cpp"

#include <torch/library.h>

#include "core/on.h"
#include "cross_entropy_losses/cuda.cu"

namespace sqloss::cross_entropy_losses {

TORCH_LIBRARY_IMPL(sqloss, CPU, m) {
  m.impl("cross_entropy_losses", core::On<forward, cuda_kernels>::call);
  m.impl("cross_entropy_losses_backward", core::On<backward, cuda_kernels>::call);
  m.impl("cross_entropy_losses_cvar", core::On<forward_cvar, cuda_kernels>::call);
}

}  // namespace sqloss::cross_entropy_losses
