// Marks functions that both the CPU's and CUDA's compiler take.
#pragma once

#ifdef __CUDACC__
#define SQLOSS_HOST_DEVICE __host__ __device__
#else
#define SQLOSS_HOST_DEVICE
#endif
