// Which kernels there are. core/choose_kernels.h says which of them serve which device.
#pragma once

// In the namespace of an operation, after its struct Kernels: declares `kernels` of each CPU
// capability and of CUDA, which its cpu.cpp and cuda.cu define.
#define SQLOSS_DECLARE_KERNELS  \
  SQLOSS_DECLARE_CPU_KERNELS    \
  namespace CUDA {              \
  extern const Kernels kernels; \
  }

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
