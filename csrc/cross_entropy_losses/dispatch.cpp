// Which kernels serve a tensor.
#include "core/cpu_capability.h"
#include "cross_entropy_losses/cross_entropy_losses.h"

namespace sqloss::cross_entropy_losses {

const Kernels& cpu_kernels() {
  static const Kernels& chosen =
      core::for_this_cpu(DEFAULT::kernels, AVX2::kernels, AVX512::kernels);
  return chosen;
}

#ifdef SQLOSS_WITH_CUDA
const Kernels& cuda_kernels() { return CUDA::kernels; }
#endif

}  // namespace sqloss::cross_entropy_losses
