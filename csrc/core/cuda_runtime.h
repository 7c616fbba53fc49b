// What of torch's CUDA runtime the kernels' host code calls, in core/torch.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sqloss::core::cuda {

// Of the current device.
cudaStream_t current_stream();

// Raises torch's error of CUDA, unless it is cudaSuccess.
void check(cudaError_t error);

// From torch's caching allocator: kernels of the current stream may use it, those already launched
// also after it is freed.
void* allocate(size_t bytes);
void free(void* memory);

// The extent of a grid, which the hardware limits.
dim3 grid(int64_t x, int64_t y = 1);

// The most bytes of dynamic shared memory that a block of the current device can have.
size_t shared_memory_limit();

// Raises the error of a tensor whose memory takes more dimensions to describe than kernels have.
void check_dims(int dims, int most);

}  // namespace sqloss::core::cuda
