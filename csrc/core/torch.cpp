// What headers for kernels declare and torch has: kernels include hardly any of its headers, whose
// compilation would take longer than theirs.
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include "core/cpu_capability.h"
#include "core/dtype.h"

#ifdef SQLOSS_WITH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "core/cuda_runtime.h"
#endif

namespace sqloss::core {

const std::string& cpu_capability() {
  static const std::string lesser =
      lesser_capability(at::get_cpu_capability(), capability_of_cpu());
  return lesser;
}

void refuse_dtype(Dtype dtype) {
  TORCH_INTERNAL_ASSERT(false, "no kernels for dtype ", static_cast<int>(dtype));
}

#ifdef SQLOSS_WITH_CUDA
namespace cuda {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

void check(cudaError_t error) { C10_CUDA_CHECK(error); }

void* allocate(size_t bytes) { return c10::cuda::CUDACachingAllocator::raw_alloc(bytes); }

void free(void* memory) { c10::cuda::CUDACachingAllocator::raw_delete(memory); }

dim3 grid(int64_t x, int64_t y) {
  TORCH_CHECK_VALUE(x <= INT32_MAX && y <= UINT16_MAX,
                    "sqloss: expected sizes for at most 2^31 - 1 by 2^16 - 1 blocks of a CUDA ",
                    "grid, got ", x, " by ", y);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

size_t shared_memory_limit() {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        c10::cuda::current_device()));
  return static_cast<size_t>(bytes);
}

void check_dims(int dims, int most) {
  TORCH_CHECK_VALUE(dims <= most, "sqloss: expected a tensor whose memory is described by at most ",
                    most, " dimensions on CUDA, got ", dims);
}

}  // namespace cuda
#endif

}  // namespace sqloss::core
