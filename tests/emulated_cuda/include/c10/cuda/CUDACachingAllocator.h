// Memory that starts as NaN.
#pragma once
#include <cstdlib>
#include <cstring>

namespace c10::cuda::CUDACachingAllocator {

inline void* raw_alloc(size_t bytes) {
  void* const data = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(data, 0xff, bytes);
  return data;
}

inline void raw_delete(void* data) { std::free(data); }

}  // namespace c10::cuda::CUDACachingAllocator
