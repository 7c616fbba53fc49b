// Which kernels serve which device.
#pragma once

#include "core/cpu_capability.h"

// In the namespace of an operation: the kernels that serve this machine's CPU and, in a build with
// CUDA, its GPUs.
#define SQLOSS_CHOOSE_KERNELS                                                 \
  inline const Kernels& cpu_kernels() {                                       \
    static const Kernels& chosen =                                            \
        core::for_this_cpu(DEFAULT::kernels, AVX2::kernels, AVX512::kernels); \
    return chosen;                                                            \
  }                                                                           \
  inline const Kernels& cuda_kernels() { return CUDA::kernels; }
