// Small functions that both the CPU's and CUDA's compiler take, and that disappear in the loops
// that call them: a call left in a loop would leave it without vectors.
#pragma once

#ifdef __CUDACC__
#define SQLOSS_INLINE __host__ __device__ __forceinline__
#else
#define SQLOSS_INLINE __attribute__((always_inline)) inline
#endif
