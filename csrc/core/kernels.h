// Which kernels serve which device.
#pragma once

#include "core/cpu_capability.h"

// In the namespace of an operation, after its struct Kernels: declares `kernels` of each CPU
// capability and of CUDA, which its cpu.cpp and cuda.cu define, and says which serve this machine's
// CPU and, in a build with CUDA, its GPUs.
#define SQLOSS_DECLARE_KERNELS                                                \
  SQLOSS_DECLARE_CPU_KERNELS                                                  \
  namespace CUDA {                                                            \
  extern const Kernels kernels;                                               \
  }                                                                           \
  inline const Kernels& cpu_kernels() {                                       \
    static const Kernels& chosen =                                            \
        core::for_this_cpu(DEFAULT::kernels, AVX2::kernels, AVX512::kernels); \
    return chosen;                                                            \
  }                                                                           \
  inline const Kernels& cuda_kernels() { return CUDA::kernels; }

#if defined(__x86_64__)
#define SQLOSS_DECLARE_CPU_KERNELS \
  namespace DEFAULT {              \
  extern const Kernels kernels;    \
  }                                \
  namespace AVX2 {                 \
  extern const Kernels kernels;    \
  }                                \
  namespace AVX512 {               \
  extern const Kernels kernels;    \
  }
#else
#define SQLOSS_DECLARE_CPU_KERNELS \
  namespace DEFAULT {              \
  extern const Kernels kernels;    \
  }                                \
  namespace AVX2 = DEFAULT;        \
  namespace AVX512 = DEFAULT;
#endif
