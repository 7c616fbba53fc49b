// The CUDA kernels of the superquantile as those of CPU tensors.
#include "superquantile/superquantile.cpp"

#include <torch/library.h>

#include "core/on.h"
#include "superquantile/cuda.cu"

namespace sqloss::superquantile {

TORCH_LIBRARY_IMPL(sqloss, CPU, m) {
  m.impl("superquantile", core::On<forward, cuda_kernels>::call);
  m.impl("superquantile_backward", core::On<backward, cuda_kernels>::call);
}

}  // namespace sqloss::superquantile
