#pragma once
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(call) TORCH_INTERNAL_ASSERT((call) == cudaSuccess)
