// The CUDA kernels of Student-t samples as those of CPU tensors.
#include "student_t/student_t.cpp"

#include <torch/library.h>

#include "core/on.h"
#include "student_t/cuda.cu"

namespace sqloss::student_t {

TORCH_LIBRARY_IMPL(sqloss, CPU, m) {
  m.impl("student_t_rsample_kl", core::On<forward, cuda_kernels>::call);
  m.impl("student_t_rsample_kl_backward", core::On<backward, cuda_kernels>::call);
  m.impl("student_t_noise", core::On<noise, cuda_kernels>::call);
}

}  // namespace sqloss::student_t
